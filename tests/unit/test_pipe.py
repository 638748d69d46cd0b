"""Both ends of a pipe: machines without I/O, the vectors of the wire, and the table in SPEC.md."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from protocols.codec import dumps
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.pipe import origin as pipe
from protocols.pipe.messages import (
    MAX_CHANCES,
    MAX_MESSAGE_BYTES,
    MAX_PREFIXES,
    MAX_STAGES,
    PIPE,
    Chance,
    Close,
    Grammar,
    Hop,
    HopTime,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    Pooled,
    Prefix,
    Refused,
    Sampling,
    Step,
    Token,
    Trace,
)
from protocols.pipe.prefixes import PREFIX_STEP, kept_as, prefixes
from protocols.pipe.stage import STAGE_TRANSITIONS, Ran, StageSession, StageState, refusal
from protocols.pipe.timeouts import FIRST_OPEN_S, FIRST_ROWS, FIRST_STEP_S, IDLE_S, OPEN_S, PREFILL_ROW_S, STEP_S
from tests.vectors import PROTOCOLS, Case, hold

S = bytes(range(16))
ROUTE = (
    Hop(peer="ann", incarnation=1, first=0, last=4),
    Hop(peer="bob", incarnation=2, first=4, last=5),
    Hop(peer="cat", incarnation=3, first=5, last=9),
)
SAMPLING = Sampling(seed=7, temperature_milli=700, top_k=40, top_p_micro=950_000, repetition_milli=1100)
PREFIXES = (Prefix(tokens=2, name=bytes(16)), Prefix(tokens=5, name=bytes([1] * 16)))
ADAPTER = "bafyreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
CHANCES = (Chance(token=11, nano_nats=2_302_585_093), Chance(token=9, nano_nats=105_360_516))
TIMES = tuple(HopTime(network_us=100 * i, queue_us=10, compute_us=1500) for i in range(3))


def origin(**more: Any) -> pipe.Origin:
    settings: dict[str, Any] = {
        "manifest": "m",
        "variant": "int4",
        "prompt": (5, 6, 7, 8, 9),
        "chunks": (3, 2),
        "max_tokens": 3,
        "eos": frozenset({2}),
        "sampling": SAMPLING,
    }
    route, drawn = more.pop("route", ROUTE), more.pop("drawn", ())
    return pipe.Origin(session=S, attempt=1, us="me", route=route, task=pipe.Task(**settings | more), drawn=drawn)


def opened(index: int, attempt: int = 1, kept: int = 0) -> pipe.Received:
    return pipe.Received(ROUTE[index].peer, Opened(session=S, attempt=attempt, index=index, kept=kept))


def token(position: int, number: int = 11, **more: Any) -> pipe.Received:
    message = Token(session=S, attempt=1, position=position, token=number, sent_us=0, times=TIMES)
    return pipe.Received("cat", replace(message, **more), 70)


def pooled(*vector: float) -> pipe.Received:
    message = Pooled(session=S, attempt=1, sent_us=0, times=TIMES)
    return pipe.Received("cat", message, 70, struct.pack(f"<{len(vector)}f", *vector))


def refused(index: int, code: str, retry_ms: int = 0) -> pipe.Received:
    message = Refused(session=S, attempt=1, index=index, code=code, reason="no room", retry_ms=retry_ms)
    return pipe.Received(ROUTE[index].peer, message)


def running(**more: Any) -> pipe.Origin:
    o = origin(**more)
    o.handle(pipe.Begin(), 0.0)
    for index in range(3):
        o.handle(opened(index), 1.0)
    assert o.state is pipe.OriginState.RUNNING
    return o


def step(position: int, rows: int, *, sample: bool = False, prefill: bool = False, hops: int = 0) -> Step:
    return Step(
        session=S,
        attempt=1,
        position=position,
        rows=rows,
        sample=sample,
        prefill=prefill,
        sent_us=0,
        times=TIMES[:hops],
    )


CLOSES = tuple(pipe.Send(peer, Close(session=S, attempt=1)) for peer in ("ann", "bob", "cat"))


# ---------------------------------------------------------------- origin


def test_every_stage_is_asked_and_only_the_last_one_samples() -> None:
    o = origin()
    effects = o.handle(pipe.Begin(), 10.0)
    assert o.deadline == 10.0 + OPEN_S
    assert [effect.peer for effect in effects if isinstance(effect, pipe.Send)] == ["ann", "bob", "cat"]
    opens = [effect.message for effect in effects if isinstance(effect, pipe.Send)]
    assert all(isinstance(m, Open) and m.route == ROUTE and m.capacity == 8 for m in opens)
    assert [m.index for m in opens if isinstance(m, Open)] == [0, 1, 2]
    assert [m.sampling for m in opens if isinstance(m, Open)] == [None, None, SAMPLING]
    assert [effect.body for effect in effects if isinstance(effect, pipe.Send)] == [(), (), (5, 6, 7, 8, 9)]
    assert all(isinstance(m, Open) and m.adapter == "" for m in opens)


def test_every_stage_is_told_the_adapter() -> None:
    effects = origin(adapter=ADAPTER).handle(pipe.Begin(), 10.0)
    assert [e.message.adapter for e in effects if isinstance(e, pipe.Send) and isinstance(e.message, Open)] == [
        ADAPTER
    ] * 3


def test_the_prompt_goes_out_in_its_chunks_once_all_are_open() -> None:
    o = origin()
    o.handle(pipe.Begin(), 0.0)
    assert o.handle(opened(2), 1.0) == ()
    assert o.handle(opened(2), 1.0) == (), "the same answer twice counts once"
    assert o.handle(opened(0), 1.0) == ()
    assert o.handle(opened(1), 2.0) == (
        pipe.Send("ann", step(0, 3, prefill=True), (5, 6, 7)),
        pipe.Send("ann", step(3, 2, prefill=True, sample=True), (8, 9)),
    )
    assert o.deadline == 2.0 + STEP_S + 5 * PREFILL_ROW_S


def test_each_token_is_the_next_step_until_the_length_is_reached() -> None:
    o = running()
    emit = pipe.Emit(11, 5, TIMES, 70)
    assert o.handle(token(5), 3.0) == (pipe.Send("ann", step(5, 1, sample=True), (11,)), emit)
    assert o.deadline == 3.0 + STEP_S
    assert o.handle(token(6, 12), 4.0)[0] == pipe.Send("ann", step(6, 1, sample=True), (12,))
    assert o.handle(token(7, 13), 5.0) == (pipe.Emit(13, 7, TIMES, 70), *CLOSES, pipe.Finished("length"))
    assert (o.state, o.deadline) == (pipe.OriginState.CLOSED, None)
    assert o.handle(token(8), 6.0) == (), "what comes after the end is nobody's fault"


def test_an_answer_goes_on_after_what_was_drawn_before() -> None:
    drawn = tuple(20 + i for i in range(pipe.REPLAY_ROWS + 1))
    o = origin(drawn=drawn, max_tokens=40)
    opens = [effect for effect in o.handle(pipe.Begin(), 0.0) if isinstance(effect, pipe.Send)]
    assert [e.message.drawn for e in opens if isinstance(e.message, Open)] == [0, 0, len(drawn)]
    assert [e.message.capacity for e in opens if isinstance(e.message, Open)] == [45, 45, 45]
    assert [effect.body for effect in opens] == [(), (), (5, 6, 7, 8, 9, *drawn)]
    o.handle(opened(0), 1.0)
    o.handle(opened(1), 1.0)
    assert o.handle(opened(2), 1.0) == (
        pipe.Send("ann", step(0, 3, prefill=True), (5, 6, 7)),
        pipe.Send("ann", step(3, 2, prefill=True), (8, 9)),
        pipe.Send("ann", step(5, pipe.REPLAY_ROWS), drawn[:-1]),
        pipe.Send("ann", step(5 + pipe.REPLAY_ROWS, 1, sample=True), drawn[-1:]),
    )
    assert o.deadline == 1.0 + STEP_S + (5 + len(drawn)) * PREFILL_ROW_S
    at = 5 + len(drawn)
    sent, emit = o.handle(token(at), 2.0)
    assert sent == pipe.Send("ann", step(at, 1, sample=True), (11,))
    assert emit == pipe.Emit(11, at, TIMES, 70)


def test_an_answer_that_is_complete_does_not_go_on() -> None:
    for drawn in ((11, 12, 13), (11, 2)):
        with pytest.raises(LocalProtocolError, match="is complete"):
            origin(drawn=drawn)


def test_chances_are_those_that_were_asked_for() -> None:
    asked = replace(SAMPLING, chances=2)
    emit = running(sampling=asked).handle(token(5, chances=CHANCES), 3.0)[1]
    assert emit == pipe.Emit(11, 5, TIMES, 70, CHANCES)
    few = running(sampling=asked).handle(token(5, chances=CHANCES[:1]), 3.0)[1]
    assert few == pipe.Emit(11, 5, TIMES, 70, CHANCES[:1]), "a vocabulary may have fewer"
    wrong = {"more": (asked, (*CHANCES, CHANCES[1])), "none": (asked, ()), "another one's": (asked, CHANCES[::-1])}
    wrong["not asked for"] = (SAMPLING, CHANCES)
    for sampling, told in wrong.values():
        o = running(sampling=sampling)
        with pytest.raises(RemoteProtocolError, match=r"cat told the chances of .* beside the token 11"):
            o.handle(token(5, chances=told), 3.0)


def test_a_prompt_becomes_one_vector() -> None:
    o = origin(max_tokens=0, pooled=2)
    opens = [effect.message for effect in o.handle(pipe.Begin(), 0.0) if isinstance(effect, pipe.Send)]
    assert [(m.sampling, m.pooled, m.capacity) for m in opens if isinstance(m, Open)] == [
        (None, False, 5),
        (None, False, 5),
        (None, True, 5),
    ]
    for index in range(3):
        o.handle(opened(index), 1.0)
    assert o.handle(pooled(0.6, -0.8), 2.0) == (
        pipe.EmitPooled(struct.unpack("<2f", struct.pack("<2f", 0.6, -0.8)), TIMES, 70),
        *CLOSES,
        pipe.Finished("pooled"),
    )


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (lambda: pooled(1.0), "a vector of 4 bytes; 8 are due"),
        (lambda: pooled(0.5, 0.5), "of length 0.707107, which is not 1"),
        (lambda: pooled(math.nan, 1.0), "of length nan"),
        (lambda: pooled(math.inf, 1.0), "of length inf"),
        (lambda: replace(pooled(0.6, 0.8), peer="ann"), "ann sent a vector, but the last stage is cat"),
        (lambda: token(5), "cat sent the token at 5, expected is a vector"),
    ],
)
def test_vectors_that_are_not_due(event: Callable[[], pipe.Received], words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        running(max_tokens=0, pooled=2).handle(event(), 3.0)


def test_a_vector_that_nobody_asked_for() -> None:
    with pytest.raises(RemoteProtocolError, match="a vector of 8 bytes; 0 are due"):
        running().handle(pooled(0.6, 0.8), 3.0)


def test_stopping_tells_every_stage() -> None:
    assert running().handle(pipe.Stop("cancelled"), 3.0) == (*CLOSES, pipe.Finished("cancelled"))
    assert origin().handle(pipe.Stop("cancelled"), 0.0) == (pipe.Finished("cancelled"),), "nobody was asked yet"


def test_a_refusal_names_who_said_no_and_when_to_ask_again() -> None:
    o = origin()
    o.handle(pipe.Begin(), 0.0)
    assert o.handle(refused(1, "busy", 500), 1.0) == (*CLOSES, pipe.Failed("busy", "no room", "bob", 500))


def test_a_stage_that_lost_the_next_one_is_not_to_blame() -> None:
    (*closes, failed) = running().handle(refused(1, pipe.LOST), 2.0)
    assert tuple(closes) == CLOSES
    assert isinstance(failed, pipe.Failed)
    assert (failed.code, failed.peer) == (pipe.LOST, "cat")
    assert failed.reason == (
        "the node cat, which runs layers 5 to 8, could not be reached from the stage before it: no room"
    )
    (*_, last) = running().handle(refused(2, pipe.LOST), 2.0)
    assert last == pipe.Failed(pipe.LOST, "no room", "cat"), "behind the last stage are only we"


def test_a_peer_that_goes_away_is_named_with_its_layers() -> None:
    o = running()
    assert o.handle(pipe.PeerGone("dora", "bye"), 2.0) == (), "it takes no part"
    failed = o.handle(pipe.PeerGone("bob", "the line is cut"), 2.0)[-1]
    words = "the node bob, which runs layer 4, went away: the line is cut; ask again"
    assert failed == pipe.Failed(pipe.LOST, words, "bob")


def test_stages_that_do_not_open_are_named() -> None:
    o = origin()
    o.handle(pipe.Begin(), 0.0)
    o.handle(opened(0), 1.0)
    failed = o.handle(pipe.Expired(), OPEN_S)[-1]
    assert failed == pipe.Failed(
        pipe.TIMEOUT,
        "the node bob, which runs layer 4, and the node cat, which runs layers 5 to 8, did not open the session "
        "within 12 s",
        "bob",
    )


def test_a_token_that_does_not_come_ends_the_session() -> None:
    failed = running().handle(pipe.Expired(), 100.0)[-1]
    assert isinstance(failed, pipe.Failed)
    assert (failed.code, failed.peer) == (pipe.TIMEOUT, None)
    assert failed.reason.startswith("no token came within 61 s from the node ann, which runs layers 0 to 3, and")
    assert failed.reason.endswith("layers 5 to 8")


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (replace(token(5), peer="ann"), "the last stage is cat"),
        (token(6), "token at 6, expected is 5"),
        (token(4), "token at 4, expected is 5"),
        (token(5, times=TIMES[:2]), "2 hop times for 3 stages"),
        (opened(0), "sent Opened; the session is running"),
        (
            pipe.Received("ann", Refused(session=S, attempt=1, index=1, code="x", reason="")),
            "stage 1, which is not its own",
        ),
        (
            pipe.Received("ann", Refused(session=S, attempt=1, index=3, code="x", reason="")),
            "stage 3, which is not its own",
        ),
    ],
)
def test_what_a_peer_may_not_send_changes_nothing(event: pipe.Received, words: str) -> None:
    o = running()
    before = o.deadline
    with pytest.raises(RemoteProtocolError, match=words):
        o.handle(event, 50.0)
    assert (o.state, o.deadline) == (pipe.OriginState.RUNNING, before)
    assert o.handle(token(5), 51.0)[-1] == pipe.Emit(11, 5, TIMES, 70)


@pytest.mark.parametrize(
    "event", [opened(0, attempt=0), token(5, attempt=0), replace(token(99, attempt=2), peer="x")]
)
def test_another_attempt_is_ignored_in_every_state(event: pipe.Received) -> None:
    fresh, opening = origin(), origin()
    opening.handle(pipe.Begin(), 0.0)
    for o in (fresh, opening, running()):
        assert o.handle(event, 1.0) == ()


def test_our_own_mistakes_are_ours() -> None:
    with pytest.raises(LocalProtocolError, match="Expired in state new"):
        origin().handle(pipe.Expired(), 0.0)
    with pytest.raises(LocalProtocolError, match="Begin in state running"):
        running().handle(pipe.Begin(), 0.0)
    for wrong in ({"route": ()}, {"prompt": ()}, {"chunks": (3, 3)}, {"max_tokens": 0}):
        with pytest.raises(LocalProtocolError):
            origin(**wrong)


# ---------------------------------------------------------------- stage


def opening(index: int, **more: Any) -> Open:
    message = Open(
        session=S,
        attempt=1,
        origin="me",
        manifest="m",
        variant="int4",
        route=ROUTE,
        index=index,
        capacity=8,
        sampling=SAMPLING if index == 2 else None,
    )
    return replace(message, **more)


def stage(index: int) -> StageSession:
    return StageSession(opening(index), ROUTE[index].peer)


def test_a_stage_passes_its_rows_on_with_their_times() -> None:
    s = stage(1)
    taken = step(0, 3, prefill=True, hops=1)
    assert s.take("ann", taken)
    assert s.ran(Ran(taken, None, TIMES[1])) == ("cat", step(0, 3, prefill=True, hops=2))


def test_the_last_stage_answers_its_origin() -> None:
    s = stage(2)
    quiet, asked = step(0, 3, prefill=True, hops=2), step(3, 2, prefill=True, sample=True, hops=2)
    assert s.take("bob", quiet)
    assert s.ran(Ran(quiet, None, TIMES[2])) is None
    assert s.take("bob", asked)
    expected = Token(session=S, attempt=1, position=5, token=11, sent_us=0, times=TIMES)
    assert s.ran(Ran(asked, 11, TIMES[2])) == ("me", expected)


@pytest.mark.parametrize(
    ("peer", "message", "words"),
    [
        ("me", step(0, 3, hops=1), "ann is the stage before us"),
        ("cat", step(0, 3, hops=1), "ann is the stage before us"),
        ("ann", step(5, 1, hops=1), "only 4 rows are here"),
        ("ann", step(4, 5, hops=1), "rows up to 9, the session holds 8"),
        ("ann", step(4, 1, hops=2), "2 hop times to stage 1"),
        ("ann", step(4, 1, hops=0), "0 hop times to stage 1"),
    ],
)
def test_a_wrong_step_changes_nothing(peer: str, message: Step, words: str) -> None:
    s = stage(1)
    s.take("ann", step(0, 4, hops=1))
    with pytest.raises(RemoteProtocolError, match=words):
        s.take(peer, message)
    assert s.state is StageState.OPEN
    assert s.take("ann", step(4, 1, hops=1))


def test_a_closed_stage_neither_takes_nor_sends() -> None:
    s = stage(1)
    taken = step(0, 3, hops=1)
    s.take("ann", taken)
    s.close()
    s.close()
    assert s.state is StageState.CLOSED
    assert not s.take("ann", step(3, 1, hops=1))
    assert s.ran(Ran(taken, None, TIMES[1])) is None


@pytest.mark.parametrize(
    ("kept", "cached", "steps"),
    [
        ((0, 5, 5), 0, [(0, 3), (3, 2)]),
        ((2, 5, 2), 2, [(2, 1), (3, 2)]),
        ((5, 5, 5), 4, [(4, 1)]),
    ],
)
def test_what_all_stages_have_kept_is_not_sent(
    kept: tuple[int, ...], cached: int, steps: list[tuple[int, int]]
) -> None:
    o = origin(prefixes=PREFIXES)
    begun = o.handle(pipe.Begin(), 0.0)
    assert all(
        e.message.prefixes == PREFIXES for e in begun if isinstance(e, pipe.Send) and isinstance(e.message, Open)
    )
    assert o.cached == 0
    sent = [effect for index in range(3) for effect in o.handle(opened(index, kept=kept[index]), 1.0)]
    messages = [e.message for e in sent if isinstance(e, pipe.Send) and isinstance(e.message, Step)]
    assert [(m.position, m.rows) for m in messages] == steps
    assert [m.sample for m in messages] == [False] * (len(steps) - 1) + [True]
    assert [e.body for e in sent if isinstance(e, pipe.Send)] == [(5, 6, 7, 8, 9)[p : p + n] for p, n in steps]
    assert o.cached == cached
    for position in (5, 6, 7):
        ended = o.handle(token(position), 2.0)
    closes = [e.message for e in ended if isinstance(e, pipe.Send)]
    assert closes == [Close(session=S, attempt=1, keep=True)] * 3


def test_rows_of_an_answer_that_failed_are_not_kept() -> None:
    o = running(prefixes=PREFIXES)
    ended = o.handle(pipe.PeerGone("bob", "it is gone"), 2.0)
    assert [e.message for e in ended if isinstance(e, pipe.Send)] == [Close(session=S, attempt=1)] * 3
    stopped = running(prefixes=PREFIXES).handle(pipe.Stop("cancelled"), 2.0)
    assert stopped[0] == pipe.Send("ann", Close(session=S, attempt=1, keep=True))


def test_a_stage_has_kept_what_it_was_asked_for_or_nothing() -> None:
    o = origin(prefixes=PREFIXES)
    o.handle(pipe.Begin(), 0.0)
    with pytest.raises(RemoteProtocolError, match="bob has kept 3 rows, which is none of the prefixes"):
        o.handle(opened(1, kept=3), 1.0)


def test_steps_begin_anywhere_in_what_a_stage_has_kept() -> None:
    s = StageSession(opening(1, prefixes=PREFIXES), "bob")
    assert s.opened(5) == Opened(session=S, attempt=1, index=1, kept=5)
    assert s.patience == FIRST_STEP_S + PREFILL_ROW_S * 8, "no step has come yet"
    with pytest.raises(RemoteProtocolError, match="only 5 rows are here"):
        s.take("ann", step(6, 1, hops=1))
    assert s.take("ann", step(2, 1, hops=1))
    with pytest.raises(RemoteProtocolError, match="only 3 rows are here"):
        s.take("ann", step(5, 1, hops=1))


def test_beginnings_of_a_prompt_have_names_that_only_their_tokens_have() -> None:
    prompt = tuple(range(300))
    assert prefixes(prompt[: PREFIX_STEP - 1]) == ()
    named = prefixes(prompt, seen=(10, 100, 500))
    assert [prefix.tokens for prefix in named] == [64, 100, 128, 192, 256, 300]
    assert prefixes(prompt[:128]) == tuple(p for p in named if p.tokens in (64, 128))
    changed = prefixes((*prompt[:130], 7, *prompt[131:]), seen=(100,))
    assert [a == b for a, b in zip(named, changed, strict=True)] == [True, True, True, False, False, False]
    salted = prefixes(prompt, seen=(100,), salt=b"somebody")
    assert not {p.name for p in salted} & {p.name for p in named}
    for length in (64, 2048, 2049, 4096, 100_000):
        many = prefixes((1,) * length, seen=range(1, length, 50))
        assert len(many) <= MAX_PREFIXES and many[-1].tokens == length
        assert len({p.name for p in many}) == len(many)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"session": bytes(16), "attempt": 2, "capacity": 9}, True),
        ({"route": (*ROUTE[:2], replace(ROUTE[2], peer="dan"))}, True),  # what comes later changes nothing here
        ({"route": (replace(ROUTE[0], peer="dan"), *ROUTE[1:])}, False),
        ({"route": (replace(ROUTE[0], incarnation=7), *ROUTE[1:])}, False),
        ({"origin": "dan"}, False),
        ({"manifest": "n"}, False),
        ({"variant": "int8"}, False),
        ({"adapter": ADAPTER}, False),
    ],
)
def test_rows_are_kept_under_all_that_they_depend_on(change: dict[str, Any], same: bool) -> None:
    first = kept_as(opening(1, prefixes=PREFIXES))
    assert [prefix.tokens for prefix in first] == [2, 5]
    assert (kept_as(opening(1, prefixes=PREFIXES, **change)) == first) is same


def test_another_attempt_of_a_step_is_stale() -> None:
    assert not stage(1).take("ann", replace(step(0, 3, hops=1), attempt=0))


def test_only_the_origin_may_close() -> None:
    assert [stage(1).may_close(peer) for peer in ("me", "ann", "bob", "cat")] == [True, False, False, False]


def test_a_refusal_ends_the_session() -> None:
    s = stage(1)
    assert s.refusal("busy", "x" * 600, 9) == ("me", refusal(opening(1), "busy", "x" * 500, 9))
    assert s.state is StageState.CLOSED


def test_a_stage_outlasts_the_patience_of_any_origin() -> None:
    longest = origin(prompt=(1,) * 1000, chunks=(1000,), max_tokens=1)
    longest.handle(pipe.Begin(), 0.0)
    for index in range(3):
        longest.handle(opened(index), 0.0)
    assert longest.deadline is not None
    s = StageSession(opening(1, capacity=1001), "bob")
    assert s.patience == FIRST_STEP_S + PREFILL_ROW_S * FIRST_ROWS
    s.take("ann", step(0, 256, hops=1, prefill=True))
    assert s.patience >= longest.deadline
    s.take("ann", step(256, 32, hops=1))
    assert s.patience >= longest.deadline, "stages behind us may have a replay to run"
    s.take("ann", step(288, 1, hops=1, sample=True))
    assert s.patience >= longest.deadline
    s.take("ann", step(289, 1, hops=1, sample=True))
    assert STEP_S < s.patience == IDLE_S
    assert StageSession(opening(0), "ann").patience == FIRST_STEP_S > OPEN_S


@pytest.mark.parametrize(
    ("change", "us", "words"),
    [
        ({}, "ann", "does not name us at stage 1"),
        ({"index": 3}, "bob", "does not name us at stage 3"),
        ({"route": ()}, "bob", "does not name us at stage 1"),
        ({"route": (ROUTE[0], replace(ROUTE[1], last=4), ROUTE[2])}, "bob", "an empty span"),
        ({"route": (replace(ROUTE[0], first=1), *ROUTE[1:])}, "bob", "does not start at layer 0"),
        ({"route": (ROUTE[0], replace(ROUTE[1], first=3), ROUTE[2])}, "bob", "a gap or an overlap"),
        ({"route": (replace(ROUTE[0], last=3), *ROUTE[1:])}, "bob", "a gap or an overlap"),
        ({"route": (*ROUTE[:2], replace(ROUTE[2], peer="ann"))}, "bob", "names a node twice"),
        ({"sampling": SAMPLING}, "bob", "has to tell the last stage, and no other"),
        ({"grammar": Grammar(kind="regex", text=b"a")}, "bob", "gave a grammar to a stage that draws no tokens"),
        ({"drawn": 1}, "bob", "gave an answer to go on with to a stage that draws no tokens"),
        ({"pooled": True}, "bob", "has to tell the last stage, and no other"),
        ({"index": 2}, "cat", "either how to sample or to pool"),
        ({"prefixes": PREFIXES[::-1]}, "bob", "each has to be longer than the one before"),
        ({"prefixes": PREFIXES[:1] * 2}, "bob", "each has to be longer than the one before"),
        ({"prefixes": PREFIXES, "capacity": 4}, "bob", "the session holds 4"),
        ({"index": 2, "sampling": SAMPLING, "pooled": True}, "cat", "either how to sample or to pool"),
    ],
)
def test_routes_that_are_no_chain(change: dict[str, Any], us: str, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        StageSession(replace(opening(1), **change), us)


# ---------------------------------------------------------------- the wire

TRACE = Trace(id=bytes(range(16)), span=bytes(range(8)))


@pytest.mark.parametrize("trace", [replace(TRACE, id=bytes(16)), replace(TRACE, span=bytes(8))])
def test_a_trace_of_zeros_is_none(trace: Trace) -> None:
    StageSession(opening(0, trace=TRACE), ROUTE[0].peer)
    with pytest.raises(RemoteProtocolError, match="trace of zeros"):
        StageSession(opening(0, trace=trace), ROUTE[0].peer)


SAMPLES: dict[str, Message] = {
    "open": opening(0),
    "open the last stage": opening(2),
    "open, greedy": opening(2, sampling=Sampling(seed=0)),
    "open, all that sampling can be": opening(
        2,
        sampling=replace(
            SAMPLING, min_p_micro=50_000, presence_milli=-2000, frequency_milli=500, chances=MAX_CHANCES
        ),
    ),
    "open with an adapter": opening(0, adapter=ADAPTER),
    "open with a grammar": opening(2, grammar=Grammar(kind="regex", text=b"a|b")),
    "open, pooled": opening(2, sampling=None, pooled=True),
    "open that goes on": opening(2, drawn=3),
    "open with prefixes": opening(0, prefixes=PREFIXES),
    "open with a trace": opening(0, trace=TRACE),
    "open with a trace that is kept": opening(0, trace=replace(TRACE, sampled=True)),
    "opened": Opened(session=S, attempt=0, index=2),
    "opened, with kept rows": Opened(session=S, attempt=0, index=2, kept=1440),
    "refused": Refused(session=S, attempt=0, index=2, code="busy", reason="All 8 sessions are taken.", retry_ms=1000),
    "refused, no retry": Refused(session=S, attempt=0, index=0, code="fenced", reason="bob serves layers 4 to 4"),
    "step of a prompt": step(0, 256, prefill=True),
    "step that samples": step(300, 1, sample=True, hops=2),
    "step of a replay": step(300, 32, hops=2),
    "token": Token(session=S, attempt=1, position=301, token=42, sent_us=123_456, times=TIMES),
    "token with chances": Token(
        session=S, attempt=1, position=301, token=42, sent_us=123_456, times=TIMES, chances=CHANCES
    ),
    "pooled": Pooled(session=S, attempt=1, sent_us=123_456, times=TIMES),
    "close": Close(session=S, attempt=1),
    "close and keep": Close(session=S, attempt=1, keep=True),
    "ping": Ping(number=1, sent_us=123_456),
    "pong": Pong(number=1, ping_sent_us=123_456, received_us=999, sent_us=1001),
}


def test_vectors() -> None:
    cases = [Case(name, PIPE.encode(message), message) for name, message in SAMPLES.items()]
    bad = {
        "empty": b"",
        "not a map": dumps([6, S]),
        "no tag": dumps({1: S, 2: 1}),
        "unknown tag": dumps({0: 9, 1: S, 2: 1}),
        "short session": dumps({0: 6, 1: S[:15], 2: 1}),
        "missing attempt": dumps({0: 6, 1: S}),
        "negative attempt": dumps({0: 6, 1: S, 2: -1}),
        "attempt out of range": dumps({0: 6, 1: S, 2: (1 << 16) + 1}),
        "no rows": dumps({0: 4, 1: S, 2: 1, 3: 0, 4: 0, 5: True, 6: 0}),
        "too many rows": dumps({0: 4, 1: S, 2: 1, 3: 0, 4: (1 << 16) + 1, 5: True, 6: 0}),
        "sample as a number": dumps({0: 4, 1: S, 2: 1, 3: 0, 4: 1, 5: 1, 6: 0}),
        "position out of range": dumps({0: 4, 1: S, 2: 1, 3: (1 << 20) + 1, 4: 1, 5: True, 6: 0}),
        "token out of range": dumps({0: 5, 1: S, 2: 1, 3: 1, 4: (1 << 24) + 1, 5: 0}),
        "too many hop times": dumps({0: 5, 1: S, 2: 1, 3: 1, 4: 1, 5: 0, 6: [{1: 0, 2: 0, 3: 0}] * (MAX_STAGES + 1)}),
        "too many chances": dumps({0: 5, 1: S, 2: 1, 3: 1, 4: 1, 5: 0, 7: [{1: 0, 2: 0}] * (MAX_CHANCES + 1)}),
        "more than certain": dumps({0: 5, 1: S, 2: 1, 3: 1, 4: 1, 5: 0, 7: [{1: 1, 2: -1}]}),
        "a large min-p": dumps(
            {0: 1, 1: S, 2: 1, 3: "me", 4: "m", 5: "v", 6: [], 7: 0, 8: 1, 9: {1: 0, 6: 1_000_001}}
        ),
        "a large penalty": dumps({0: 1, 1: S, 2: 1, 3: "me", 4: "m", 5: "v", 6: [], 7: 0, 8: 1, 9: {1: 0, 8: -2001}}),
        "long grammar": dumps(
            {
                0: 1,
                1: S,
                2: 1,
                3: "me",
                4: "m",
                5: "v",
                6: [],
                7: 0,
                8: 1,
                9: {1: 0},
                14: {1: "lark", 2: bytes(65537)},
            }
        ),
        "a grammar in letters": dumps(
            {0: 1, 1: S, 2: 1, 3: "me", 4: "m", 5: "v", 6: [], 7: 0, 8: 1, 9: {1: 0}, 14: {1: "lark", 2: "a"}}
        ),
        "capacity 0": dumps({0: 1, 1: S, 2: 1, 3: "me", 4: "m", 5: "v", 6: [], 7: 0, 8: 0}),
        "no nucleus": dumps({0: 1, 1: S, 2: 1, 3: "me", 4: "m", 5: "v", 6: [], 7: 0, 8: 1, 9: {1: 0, 4: 0}}),
        "too much drawn": dumps({0: 1, 1: S, 2: 1, 3: "me", 4: "m", 5: "v", 6: [], 7: 0, 8: 1, 16: (1 << 20) + 1}),
        "long adapter": dumps({0: 1, 1: S, 2: 1, 3: "me", 4: "m", 5: "v", 6: [], 7: 0, 8: 1, 10: "b" * 65}),
        "too many prefixes": dumps(
            {
                0: 1,
                1: S,
                2: 1,
                3: "me",
                4: "m",
                5: "v",
                6: [],
                7: 0,
                8: 1,
                11: [{1: i + 1, 2: S} for i in range(MAX_PREFIXES + 1)],
            }
        ),
        "short name": dumps({0: 1, 1: S, 2: 1, 3: "me", 4: "m", 5: "v", 6: [], 7: 0, 8: 1, 11: [{1: 1, 2: S[:15]}]}),
        "short trace": dumps(
            {0: 1, 1: S, 2: 1, 3: "me", 4: "m", 5: "v", 6: [], 7: 0, 8: 1, 13: {1: S[:15], 2: S[:8]}}
        ),
        "long code": dumps({0: 3, 1: S, 2: 1, 3: 0, 4: "b" * 33, 5: "no"}),
        "unknown even key": dumps({0: 6, 1: S, 2: 1, 4: 1}),
        "spelt-out default": dumps({0: 3, 1: S, 2: 1, 3: 0, 4: "busy", 5: "no", 6: 0}),
        "truncated": PIPE.encode(SAMPLES["close"])[:-1],
        "trailing byte": PIPE.encode(SAMPLES["close"]) + b"\0",
    }
    hold("pipe", cases + [Case(name, data) for name, data in bad.items()], PIPE.decode)


def test_the_longest_route_fits() -> None:
    hops = tuple(
        Hop(peer=f"{i:0>64}", incarnation=(1 << 63) - 1, first=900 + i, last=901 + i) for i in range(MAX_STAGES)
    )
    times = tuple(HopTime(network_us=(1 << 63) - 1, queue_us=1 << 62, compute_us=1 << 62) for _ in hops)
    last = MAX_STAGES - 1
    big = opening(last, route=hops, origin="o" * 64, manifest="m" * 64, variant="v" * 32, sampling=SAMPLING)
    assert len(PIPE.encode(big)) <= MAX_MESSAGE_BYTES
    assert len(PIPE.encode(replace(step(0, 1), times=times))) <= MAX_MESSAGE_BYTES


def test_the_specification_shows_the_transitions() -> None:
    text = (PROTOCOLS / "pipe" / "SPEC.md").read_text()
    for name, table in (("origin", pipe.ORIGIN_TRANSITIONS), ("stage", STAGE_TRANSITIONS)):
        part = text.split(f"<!-- {name} -->")[1].split("<!-- end")[0]
        rows = re.findall(r"^\| (\w+) \| ([\w ]+) \| (\w+) \|$", part, re.M)
        shown = {(state, event): after for state, event, after in rows if state != "State"}
        assert shown == {
            (s.value, e.value if isinstance(e, pipe.OriginTurn) else e.__name__): after.value
            for (s, e), after in table.items()
        }


def test_the_specification_shows_the_constants() -> None:
    text = (PROTOCOLS / "pipe" / "SPEC.md").read_text()
    limits = {
        "OPEN_S": OPEN_S,
        "FIRST_OPEN_S": FIRST_OPEN_S,
        "FIRST_STEP_S": FIRST_STEP_S,
        "FIRST_ROWS": FIRST_ROWS,
        "STEP_S": STEP_S,
        "PREFIX_STEP": PREFIX_STEP,
        "MAX_PREFIXES": MAX_PREFIXES,
        "IDLE_S": IDLE_S,
        "REPLAY_ROWS": pipe.REPLAY_ROWS,
        "PREFILL_ROW_S": PREFILL_ROW_S,
    }
    for name, seconds in limits.items():
        assert f"| `{name}` | {seconds:g} |" in text
