"""The stage service alone: what honest, confused and hostile peers send it, in virtual time."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.policy.shares import PROBE_TOKENS, SILENT_S
from meshnode.services.inference.adapters import AdapterService
from meshnode.services.inference.advertised_load import QUEUE_STEP_US, AdvertisedLoad
from meshnode.services.inference.grammars import GrammarService
from meshnode.services.inference.stage import MAX_UNTOLD, MAX_WAITING_STEPS, StageService
from meshnode.text.in_process import open_in_process
from protocols.advert.messages import Span
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.pipe.messages import Close, Hop, HopTime, Message, Open, Opened, Refused, Step, Token
from protocols.pipe.timeouts import FIRST_STEP_S, IDLE_S
from tests.adverts import MANIFEST, OTHER_MANIFEST
from tests.everything import EVERYTHING
from tests.services.pipe_mesh import GREEDY, LAYERS, PROMPT, SHAPE, LocalEngine, Released, Served, alone

S = bytes(range(16))
US, ME, BOB, CAT = PeerId("us"), PeerId("me"), PeerId("bob"), PeerId("cat")
TIME = HopTime(network_us=0, queue_us=0, compute_us=0)


@dataclass
class Bench:
    """A stage service over an engine, in the place of its pipes and its spans; and what it sent."""

    served: Served
    sent: list[tuple[PeerId, Message, bytes]] = field(default_factory=list)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    open: bool = True
    deliver: Callable[[PeerId], Awaitable[None]] | None = None
    failures: list[str] = field(default_factory=list)
    load: AdvertisedLoad = field(default_factory=AdvertisedLoad)

    def __post_init__(self) -> None:
        self._handlers: dict[type, Callable[..., None]] = {}
        adapters = AdapterService(self, self, Released())  # type: ignore[arg-type]
        grammars = GrammarService(self, self, open_in_process)  # type: ignore[arg-type]
        self.service = StageService(US, self, self, self.load, EVERYTHING, adapters, grammars)

    def handle(self, kind: type, handler: Callable[..., None]) -> None:
        self._handlers[kind] = handler

    def on_lost(self, listener: Callable[[PeerId, str], None]) -> None:
        self.lose = listener

    async def send(self, peer: PeerId, message: Message, body: bytes = b"") -> None:
        await trio.lowlevel.checkpoint()
        if self.deliver is not None:
            await self.deliver(peer)
        self.sent.append((peer, message, body))

    @property
    def serving(self) -> Served | None:
        return self.served if self.open else None

    def engine_lost(self, _: object, reason: str) -> None:
        self.failures.append(reason)

    @property
    def local(self) -> LocalEngine:
        return self.served.engine

    @property
    def said(self) -> list[tuple[str, str]]:
        """(code, reason) of the refusals."""
        return [(m.code, m.reason) for _, m, _ in self.sent if isinstance(m, Refused)]

    @property
    def tokens(self) -> list[tuple[int, int]]:
        return [(m.position, m.token) for _, m, _ in self.sent if isinstance(m, Token)]

    def receive(self, peer: PeerId, message: Open | Step | Close, body: bytes = b"") -> None:
        self._handlers[type(message)](peer, message, body, 0)

    async def take(self, peer: PeerId, message: Open | Step | Close, body: bytes = b"") -> None:
        """Deliver one message and let the service do what it can do at once."""
        self.receive(peer, message, body)
        with trio.move_on_after(0.5):
            await trio.sleep_forever()


@asynccontextmanager
async def bench(first: int = 0, last: int = LAYERS, **limits: int) -> AsyncIterator[Bench]:
    engine = LocalEngine(first, last, **limits)
    made = Bench(Served(engine, Span(manifest=MANIFEST, variant="int4", first=first, last=last)))

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        with made.scope:
            await made.service.run(task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        yield made
        nursery.cancel_scope.cancel()


ALONE = (Hop(peer=US, incarnation=1, first=0, last=LAYERS),)
MIDDLE = (
    Hop(peer=BOB, incarnation=1, first=0, last=3),
    Hop(peer=US, incarnation=1, first=3, last=6),
    Hop(peer=CAT, incarnation=1, first=6, last=LAYERS),
)


def opening(route: tuple[Hop, ...] = ALONE, **more: Any) -> Open:
    index = [hop.peer for hop in route].index(US)
    message = Open(
        session=S,
        attempt=1,
        origin=ME,
        manifest=MANIFEST,
        variant="int4",
        route=route,
        index=index,
        capacity=32,
        sampling=GREEDY if index == len(route) - 1 else None,
    )
    return replace(message, **more)


def step(position: int, rows: int, *, hops: int = 0, **more: Any) -> Step:
    message = Step(
        session=S,
        attempt=1,
        position=position,
        rows=rows,
        sample=True,
        prefill=rows > 1,
        sent_us=0,
        times=(TIME,) * hops,
    )
    return replace(message, **more)


def ids(*tokens: int) -> bytes:
    return struct.pack(f"<{len(tokens)}i", *tokens)


def hidden(rows: int, value: float = 1.0) -> bytes:
    return np.full((rows, SHAPE.hidden), value, "<f4").tobytes()


# ---------------------------------------------------------------- the way it is meant


@pytest.fixture
async def b() -> AsyncIterator[Bench]:
    async with bench() as made:
        yield made


async def test_one_session_from_open_to_close(b: Bench, autojump_clock: MockClock) -> None:
    right = alone(most=3)
    await b.take(ME, opening(), ids(*PROMPT))
    assert b.sent == [(ME, Opened(session=S, attempt=1, index=0), b"")]
    assert (b.load.sessions, b.served.sessions) == (1, 1)
    await b.take(ME, step(0, 3, sample=False), ids(*PROMPT[:3]))
    await b.take(ME, step(3, 2), ids(*PROMPT[3:]))
    for i in range(2):
        await b.take(ME, step(5 + i, 1), ids(right[i]))
    assert b.tokens == [(5, right[0]), (6, right[1]), (7, right[2])]
    await b.take(ME, Close(session=S, attempt=1))
    await b.take(ME, Close(session=S, attempt=1))
    assert (b.load.sessions, b.served.sessions, b.local.open_sessions) == (0, 0, set())
    assert b.said == []


async def test_a_middle_stage_passes_its_rows_on(autojump_clock: MockClock) -> None:
    async with bench(3, 6) as b:
        await b.take(ME, opening(MIDDLE))
        await b.take(BOB, step(0, 2, hops=1), hidden(2))
        peer, message, body = b.sent[-1]
        assert isinstance(message, Step)
        assert (peer, message.rows, len(message.times), len(body)) == (CAT, 2, 2, len(hidden(2)))
        assert message.times[1].compute_us == 1000


async def test_part_of_the_span_can_be_asked_for(autojump_clock: MockClock) -> None:
    async with bench(1, 8) as b:
        await b.take(ME, opening(MIDDLE))
        assert isinstance(b.sent[-1][1], Opened)


async def test_a_step_again_gives_the_same_token_again(b: Bench, autojump_clock: MockClock) -> None:
    right = alone(most=2)
    await b.take(ME, opening(), ids(*PROMPT))
    await b.take(ME, step(0, 5), ids(*PROMPT))
    await b.take(ME, step(5, 1), ids(right[0]))
    await b.take(ME, step(0, 5), ids(*PROMPT))
    await b.take(ME, step(5, 1), ids(right[0]))
    assert b.tokens == [(5, right[0]), (6, right[1])] * 2


async def test_the_queue_is_measured(b: Bench, autojump_clock: MockClock) -> None:
    b.local.tampers = lambda result: replace(result, compute_us=0)
    await b.take(ME, opening(), ids(*PROMPT))
    await b.take(ME, step(0, 5), ids(*PROMPT))
    token = next(m for _, m, _ in b.sent if isinstance(m, Token))
    assert token.times[0].queue_us > 0


def test_the_wait_is_told_when_it_has_moved() -> None:
    load = AdvertisedLoad()
    for _ in range(100):
        load.waited(QUEUE_STEP_US)
    assert (load.queue_us, load.changes.version) == (0, 0), "every advert costs every node"
    for _ in range(100):
        load.waited(10 * QUEUE_STEP_US)
    assert 6 * QUEUE_STEP_US < load.queue_us < 10 * QUEUE_STEP_US
    assert load.changes.version < 6


async def test_sessions_that_stay_are_told(b: Bench, autojump_clock: MockClock) -> None:
    await b.take(ME, opening(), ids(*PROMPT))
    b.receive(ME, Close(session=S, attempt=1))
    b.receive(ME, opening(attempt=2), ids(*PROMPT))
    told = b.load.changes.version
    with trio.move_on_after(1):
        await b.load.changes.wait()
    assert (b.load.sessions, b.load.changes.version) == (1, told)
    b.receive(ME, Close(session=S, attempt=2))
    with trio.fail_after(1):
        await b.load.changes.wait(told)
    assert b.load.sessions == 0


# ---------------------------------------------------------------- opening


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"manifest": OTHER_MANIFEST}, "not the model that was asked for"),
        ({"variant": "int8"}, "serves int4 of"),
        ({"route": (replace(ALONE[0], incarnation=2),)}, "was restarted since the route was made"),
        ({"route": (replace(ALONE[0], last=10),)}, "serves layers 0 to 8, not layers 0 to 9"),
    ],
)
async def test_what_we_do_not_serve_exactly_is_fenced(
    b: Bench, change: dict[str, Any], words: str, autojump_clock: MockClock
) -> None:
    await b.take(ME, opening(**change), ids(*PROMPT))
    ((code, reason),) = b.said
    assert (code, words in reason) == ("fenced", True)
    assert b.load.sessions == 0


async def test_a_node_without_layers_says_so(b: Bench, autojump_clock: MockClock) -> None:
    b.open = False
    await b.take(ME, opening(), ids(*PROMPT))
    assert b.said == [("fenced", "us serves no layers at the moment")]


@pytest.mark.parametrize(
    ("peer", "message", "body", "words"),
    [
        (BOB, opening(), b"", "in the name of me"),
        (ME, opening(index=1), b"", "does not name us"),
        (ME, opening(sampling=None), b"", "either how to sample or to pool"),
        (ME, opening(), ids(*PROMPT)[:-1], "a prompt of 19 bytes"),
        (ME, opening(), ids(*range(33)), "the session holds 32"),
    ],
)
async def test_an_open_that_breaks_the_rules_costs_the_pipe(
    b: Bench, peer: PeerId, message: Open, body: bytes, words: str, autojump_clock: MockClock
) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        await b.take(peer, message, body)
    assert (b.load.sessions, b.sent) == (0, [])


async def test_a_session_is_not_opened_twice(b: Bench, autojump_clock: MockClock) -> None:
    await b.take(ME, opening(), ids(*PROMPT))
    for peer, message in (
        (ME, opening()),
        (ME, opening(attempt=0)),
        (BOB, opening(origin=BOB, attempt=2)),
    ):
        with pytest.raises(RemoteProtocolError, match="a second time"):
            await b.take(peer, message, ids(*PROMPT))
    await b.take(ME, step(0, 5), ids(*PROMPT))
    assert b.tokens == [(5, alone(most=1)[0])]


async def test_a_higher_attempt_replaces_the_session(b: Bench, autojump_clock: MockClock) -> None:
    right = alone(most=1)
    await b.take(ME, opening(), ids(*PROMPT))
    b.local.held = trio.Event()
    await b.take(ME, step(0, 5), ids(*PROMPT))
    await b.take(ME, opening(attempt=2), ids(*PROMPT))
    b.local.held.set()
    await b.take(ME, step(0, 5), ids(*PROMPT))
    assert b.tokens == [], "steps of the old attempt are stale"
    await b.take(ME, step(0, 5, attempt=2), ids(*PROMPT))
    assert b.tokens == [(5, right[0])]
    assert (b.load.sessions, b.served.sessions, len(b.local.open_sessions)) == (1, 1, 1)


async def test_a_full_engine_says_when_to_come_again(autojump_clock: MockClock) -> None:
    async with bench(max_sessions=1) as b:
        await b.take(ME, opening(), ids(*PROMPT))
        await b.take(ME, opening(session=bytes(16)), ids(*PROMPT))
        (refused,) = [m for _, m, _ in b.sent if isinstance(m, Refused)]
        assert (refused.session, refused.code, refused.retry_ms) == (bytes(16), "busy", 1000)
        assert b.load.sessions == 1


async def test_too_little_memory_and_too_long_sessions_are_told_apart(autojump_clock: MockClock) -> None:
    async with bench(max_kv_bytes=1000) as b:
        await b.take(ME, opening(), ids(*PROMPT))
        await b.take(ME, opening(session=bytes(16), capacity=SHAPE.context + 1), ids(*PROMPT))
        (_, room), (_, context) = b.said
        assert "this node has room for 3 tokens" in room
        assert "the model's context is 256" in context


async def test_a_flood_of_sessions_does_not_pile_up(autojump_clock: MockClock) -> None:
    sending = []

    async def deaf(peer: PeerId) -> None:
        sending.append(peer)
        await trio.sleep_forever()

    async with bench(max_sessions=8) as b:
        b.deliver = deaf
        for number in range(4 * MAX_UNTOLD):
            b.receive(ME, opening(session=number.to_bytes(16, "big")), ids(*PROMPT))
        assert b.load.sessions == 6, "two are kept for others"
        with trio.move_on_after(10):
            await trio.sleep_forever()
        assert (b.load.sessions, len(sending)) == (6, 6 + MAX_UNTOLD)
        b.deliver = None
        await b.take(BOB, opening(session=S, origin=BOB), ids(*PROMPT))
        assert b.load.sessions == 7


async def test_a_session_without_a_step_goes(b: Bench, autojump_clock: MockClock) -> None:
    await b.take(ME, opening(), ids(*PROMPT))
    with trio.move_on_after(FIRST_STEP_S):
        await trio.sleep_forever()
    assert [code for code, _ in b.said] == ["idle"]
    assert b.local.open_sessions == set()


async def test_silent_sessions_go_for_whoever_has_none(autojump_clock: MockClock) -> None:
    async with bench(max_sessions=4) as b:
        names = [bytes([n]) * 16 for n in range(4)]
        for name in names[:3]:
            await b.take(ME, opening(session=name), ids(*PROMPT))
            await b.take(ME, step(0, 5, session=name), ids(*PROMPT))
        await b.take(BOB, opening(session=names[3], origin=BOB), ids(*PROMPT))
        await b.take(BOB, step(0, 5, session=names[3]), ids(*PROMPT))
        for seconds, code in ((1, "busy"), (SILENT_S, "idle")):
            with trio.move_on_after(seconds):
                await trio.sleep_forever()
            await b.take(CAT, opening(session=bytes(15) + b"c", origin=CAT), ids(*PROMPT))
            assert b.said[-1][0] == code
        assert isinstance(b.sent[-1][1], Opened)
        assert len(b.local.open_sessions) == 4
        refused = [(peer, m.session) for peer, m, _ in b.sent if isinstance(m, Refused) and m.code == "idle"]
        assert refused == [(ME, names[0])]


async def test_a_full_stage_still_answers_a_probe(autojump_clock: MockClock) -> None:
    async with bench(max_sessions=1) as b:
        await b.take(ME, opening(), ids(*PROMPT))
        probe = opening(session=bytes(16), origin=BOB, capacity=PROBE_TOKENS)
        await b.take(BOB, probe, ids(1, 1))
        await b.take(BOB, step(0, 2, session=bytes(16)), ids(1, 1))
        assert len(b.tokens) == 1


# ---------------------------------------------------------------- steps and closing


async def test_steps_of_unknown_sessions_are_nobody_s_fault(b: Bench, autojump_clock: MockClock) -> None:
    await b.take(BOB, step(0, 1), ids(1))
    await b.take(BOB, Close(session=S, attempt=1))
    assert b.sent == []


async def test_a_stranger_can_neither_feed_nor_close_a_session(b: Bench, autojump_clock: MockClock) -> None:
    await b.take(ME, opening(), ids(*PROMPT))
    with pytest.raises(RemoteProtocolError, match="me is the stage before us"):
        await b.take(BOB, step(0, 5), ids(*PROMPT))
    with pytest.raises(RemoteProtocolError, match="closed a session of another origin"):
        await b.take(BOB, Close(session=S, attempt=1))
    await b.take(ME, Close(session=S, attempt=0))
    await b.take(ME, step(0, 5), ids(*PROMPT))
    assert b.tokens == [(5, alone(most=1)[0])]


@pytest.mark.parametrize(
    ("message", "body", "code", "words"),
    [
        (step(1, 1), ids(5), "fenced", "only 0 rows are here"),
        (step(0, 33), ids(*[5] * 33), "fenced", "the session holds 32"),
        (step(0, 2, hops=1), ids(5, 6), "fenced", "1 hop times to stage 0"),
        (step(0, 2), ids(5), "bad-request", "me sent 4 bytes for 2 rows; 8 are due"),
        (step(0, 1), b"", "bad-request", "me sent 0 bytes for 1 rows; 4 are due"),
        (step(0, 2), ids(5, SHAPE.vocab), "bad-request", "outside the vocabulary of 211"),
        (step(0, 2), ids(5, -1), "bad-request", "outside the vocabulary of 211"),
    ],
)
async def test_wrong_rows_end_the_session_with_a_sentence(
    b: Bench, message: Step, body: bytes, code: str, words: str, autojump_clock: MockClock
) -> None:
    await b.take(ME, opening(), ids(*PROMPT))
    await b.take(ME, message, body)
    ((said, reason),) = b.said
    assert (said, words in reason) == (code, True), reason
    assert (b.load.sessions, b.served.sessions, b.local.open_sessions) == (0, 0, set())
    await b.take(ME, step(0, 1), ids(5))
    assert b.tokens == []


@pytest.mark.parametrize("body", [hidden(1), hidden(2)[:-4], ids(1, 2)])
async def test_wrong_hidden_states_are_the_fault_of_the_stage_before(body: bytes, autojump_clock: MockClock) -> None:
    async with bench(3, 6) as b:
        await b.take(ME, opening(MIDDLE))
        await b.take(BOB, step(0, 2, hops=1), body)
        ((code, reason),) = b.said
        assert (code, reason.startswith("bob sent")) == ("bad-input", True)


@pytest.mark.parametrize("liar", [ME, CAT])
async def test_only_the_stage_before_feeds(liar: PeerId, autojump_clock: MockClock) -> None:
    async with bench(3, 6) as b:
        await b.take(ME, opening(MIDDLE))
        await b.take(liar, step(0, 2, hops=1), hidden(2))
        assert b.said == [("fenced", f"{liar} sent a step, but bob is the stage before us")]


async def test_a_flood_of_steps_ends_the_session(b: Bench, autojump_clock: MockClock) -> None:
    await b.take(ME, opening(capacity=SHAPE.context), ids(*PROMPT))
    b.local.held = trio.Event()
    for _ in range(MAX_WAITING_STEPS + 2):
        b.receive(ME, step(0, 1), ids(5))
    assert b.load.sessions == 0
    b.local.held.set()
    await b.take(ME, Close(session=S, attempt=1))
    assert [code for code, _ in b.said] == ["busy"]
    assert b.local.open_sessions == set()


async def test_few_large_steps_are_a_flood_as_well(b: Bench, autojump_clock: MockClock) -> None:
    await b.take(ME, opening(), ids(*PROMPT))
    b.local.held = trio.Event()
    for _ in range(3):
        b.receive(ME, step(0, 32), ids(*[5] * 32))
    await wait_all_tasks_blocked()
    assert [code for code, _ in b.said] == ["busy"]
    b.local.held.set()


# ---------------------------------------------------------------- the world


async def test_an_engine_that_dies_is_reported_and_the_session_ends(b: Bench, autojump_clock: MockClock) -> None:
    await b.take(ME, opening(), ids(*PROMPT))
    b.local.dies_after = 0
    await b.take(ME, step(0, 5), ids(*PROMPT))
    assert b.failures == ["it was killed by SIGKILL"]
    assert b.said == [("engine-lost", "the engine of us failed: it was killed by SIGKILL")]
    assert b.served.sessions == 0


@pytest.mark.parametrize(
    "error", [PeerUnreachable("cat is not connected", peer=CAT), Declined("stranger", "cat does not admit us")]
)
async def test_a_next_stage_that_can_not_be_reached_is_reported(error: Exception, autojump_clock: MockClock) -> None:
    async def fail(peer: PeerId) -> None:
        if peer == CAT:
            raise error

    async with bench(3, 6) as b:
        await b.take(ME, opening(MIDDLE))
        b.deliver = fail
        await b.take(BOB, step(0, 2, hops=1), hidden(2))
        assert b.said == [("lost", f"us can't pass a step on: {error}")]
        assert b.local.open_sessions == set()


async def test_a_next_stage_that_goes_away_is_reported_before_the_next_step(autojump_clock: MockClock) -> None:
    async with bench(3, 6) as b:
        await b.take(ME, opening(MIDDLE))
        b.lose(BOB, "it is the business of its origin")
        assert b.load.sessions == 1
        b.lose(CAT, "the connection was lost")
        await wait_all_tasks_blocked()
        assert b.said == [("lost", "us can't pass a step on: the connection was lost")]
        assert b.load.sessions == 0


async def test_the_sessions_of_an_origin_end_with_it(b: Bench, autojump_clock: MockClock) -> None:
    await b.take(ME, opening(), ids(*PROMPT))
    await b.take(BOB, opening(origin=BOB, session=bytes(16)), ids(*PROMPT))
    b.lose(ME, "gone")
    await b.take(BOB, step(0, 5, session=bytes(16)), ids(*PROMPT))
    assert b.local.open_sessions == {bytes(16)}
    assert b.tokens == [(5, alone(most=1)[0])]


async def test_an_origin_that_takes_nothing_holds_nobody_up(b: Bench, autojump_clock: MockClock) -> None:
    async def deaf(peer: PeerId) -> None:
        if peer == ME:
            await trio.sleep_forever()

    b.deliver = deaf
    b.open = False
    for _ in range(2 * MAX_UNTOLD):
        b.receive(ME, opening(), ids(*PROMPT))
    b.open = True
    await b.take(BOB, opening(origin=BOB), ids(*PROMPT))
    await b.take(BOB, step(0, 5), ids(*PROMPT))
    assert b.tokens == [(5, alone(most=1)[0])]


async def test_a_forgotten_session_is_freed(b: Bench, autojump_clock: MockClock) -> None:
    right = alone(most=2)
    await b.take(ME, opening(), ids(*PROMPT))
    await b.take(ME, step(0, 5), ids(*PROMPT))
    await b.take(ME, step(5, 1), ids(right[0]))
    with trio.move_on_after(IDLE_S - 1):
        await trio.sleep_forever()
    assert b.load.sessions == 1
    with trio.move_on_after(1):
        await trio.sleep_forever()
    assert [code for code, _ in b.said] == ["idle"]
    assert b.local.open_sessions == set()


async def test_stopping_frees_every_session(b: Bench, autojump_clock: MockClock) -> None:
    for number in range(3):
        await b.take(ME, opening(session=bytes([number] * 16)), ids(*PROMPT))
    b.scope.cancel()
    with trio.move_on_after(1):
        await trio.sleep_forever()
    assert (b.local.open_sessions, b.served.sessions, b.load.sessions) == (set(), 0, 0)
    b.lose(ME, "afterwards")
