"""The intent of one node and the promises it gives: machines without I/O; the vectors of the wire."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from protocols.advert.messages import Span
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.intent import machine as intent
from protocols.intent.machine import Keeper, Mover, Standing, State, Want, settled_wait_s
from protocols.intent.messages import HOLD_MS, HOLDS, Held, Hold, NotHeld
from tests.vectors import Case, hold


def span(first: int, last: int, manifest: str = "m") -> Span:
    return Span(manifest=manifest, variant="int4", first=first, last=last)


def mover() -> Mover:
    return Mover(lambda: 0.5)


def want(*, source: Span | None = None, leaves: bool = False, exclusive: bool = False) -> Want:
    return Want(target=span(4, 8), source=source, leaves=leaves, exclusive=exclusive, wait_s=1.0)


def confirmed(want: Want) -> tuple[Mover, tuple[intent.Effect, ...]]:
    """A mover whose wish held for its second, and what it does next."""
    m = mover()
    m.handle(want, 0.0)
    m.handle(intent.Expired(), 1.0)
    return m, m.handle(intent.Confirmed(), 1.0)


def test_a_node_without_layers_goes_straight_to_its_place() -> None:
    m = mover()
    assert m.handle(want(), 10.0) == (intent.Announce(span(4, 8), 1),)
    assert (m.state, m.deadline) == (State.ANNOUNCED, 11.0)
    assert m.handle(intent.Expired(), 11.0) == (intent.Recheck(),)
    assert m.deadline is None
    assert m.handle(intent.Confirmed(), 11.0) == (intent.Load(span(4, 8)),)
    assert m.handle(intent.Loaded(), 15.0) == (intent.Switch(span(4, 8)),)
    assert (m.state, m.want, m.deadline) == (State.RESTING, None, None)


def test_make_before_break_asks_before_it_parts() -> None:
    m, effects = confirmed(want(source=span(0, 4), leaves=True))
    assert effects == (intent.Load(span(4, 8)),)
    assert m.handle(intent.Loaded(), 5.0) == (intent.AskHolds(span(4, 8), False, 1),)
    assert m.state is State.PARTING
    assert m.handle(intent.Guarded(), 5.1) == (intent.Switch(span(4, 8)),)


def test_without_promises_what_was_loaded_is_thrown_away() -> None:
    m, _ = confirmed(want(source=span(0, 4), leaves=True))
    m.handle(intent.Loaded(), 5.0)
    assert m.handle(intent.Refused("nobody stays"), 6.0) == (intent.Discard(), intent.Withdraw("nobody stays"))
    assert (m.state, m.deadline) == (State.PAUSED, 16.0)
    assert m.handle(intent.Expired(), 16.0) == ()
    assert m.state is State.RESTING


def test_break_before_make_asks_before_it_releases() -> None:
    m, effects = confirmed(want(source=span(0, 4), leaves=True, exclusive=True))
    assert effects == (intent.AskHolds(span(4, 8), True, 1),)
    assert m.handle(intent.Guarded(), 2.0) == (intent.Vacate(), intent.Load(span(4, 8)))
    assert m.handle(intent.Loaded(), 3.0) == (intent.Switch(span(4, 8)),)


def test_nothing_is_asked_when_nothing_is_at_risk() -> None:
    _, effects = confirmed(want(source=span(0, 4), exclusive=True))
    assert effects == (intent.Vacate(), intent.Load(span(4, 8)))


@pytest.mark.parametrize("exclusive", [False, True])
def test_promises_that_do_not_come_end_the_move(exclusive: bool) -> None:
    m, _ = confirmed(want(source=span(0, 4), leaves=True, exclusive=exclusive))
    if not exclusive:
        m.handle(intent.Loaded(), 1.0)
    assert m.deadline == 11.0
    effects = m.handle(intent.Expired(), 11.0)
    assert isinstance(effects[-1], intent.Withdraw)
    assert m.state is State.PAUSED


def test_failures_pause_longer_and_longer() -> None:
    m = mover()
    pauses = []
    now = 0.0
    for _ in range(8):
        m.handle(want(), now)
        m.handle(intent.Expired(), now)
        m.handle(intent.Confirmed(), now)
        m.handle(intent.Failed("no bytes"), now)
        assert m.deadline is not None
        pauses.append(m.deadline - now)
        now = m.deadline
        m.handle(intent.Expired(), now)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert m.epoch == 8
    assert m.reason == "no bytes"


def test_loading_for_ever_is_a_failure() -> None:
    m, _ = confirmed(want())
    assert m.deadline == 601.0
    assert m.handle(intent.Expired(), 601.0)[0] == intent.Discard()
    assert m.failures == 1


def test_a_cancelled_move_leaves_nothing_behind() -> None:
    m = mover()
    assert m.handle(intent.Cancelled("leaving"), 0.0) == ()
    m.handle(want(), 0.0)
    assert m.handle(intent.Cancelled("leaving"), 0.5) == (intent.Withdraw("leaving"),)
    m.handle(want(), 1.0)
    m.handle(intent.Expired(), 2.0)
    m.handle(intent.Confirmed(), 2.0)
    assert m.handle(intent.Cancelled("leaving"), 3.0) == (intent.Discard(), intent.Withdraw("leaving"))
    assert (m.state, m.want, m.deadline) == (State.RESTING, None, None)


def test_what_a_state_does_not_expect_changes_nothing() -> None:
    m = mover()
    with pytest.raises(LocalProtocolError, match="Loaded while resting"):
        m.handle(intent.Loaded(), 0.0)
    m.handle(want(), 0.0)
    with pytest.raises(LocalProtocolError, match="Want while announced"):
        m.handle(want(), 0.0)
    assert (m.state, m.epoch) == (State.ANNOUNCED, 1)


def test_the_wait_grows_with_the_mesh() -> None:
    assert [settled_wait_s(n) for n in (1, 3, 16, 17, 256, 1000)] == [4, 4, 4, 5, 6, 7]


def ask(first: int, last: int, manifest: str = "m", *, returns: bool = False) -> Hold:
    return Hold(manifest=manifest, variant="int4", first=first, last=last, epoch=1, hold_ms=60_000, returns=returns)


def test_a_keeper_promises_what_it_serves_and_stays_with() -> None:
    k = Keeper()
    serving = Standing(span=span(0, 6), target=None, leaving=False)
    assert k.asked("a", ask(2, 4), serving, 0.0) == Held(hold_ms=HOLD_MS)
    assert k.promised(3, 9, 29.0) == "a"
    assert k.promised(4, 9, 29.0) is None
    assert k.promised(0, 9, 30.0) is None, "it has run out"


@pytest.mark.parametrize(
    ("question", "standing", "code"),
    [
        (ask(2, 4), Standing(span=None, target=None, leaving=False), "fenced"),
        (ask(2, 4, "other"), Standing(span=span(0, 6), target=None, leaving=False), "fenced"),
        (ask(4, 8), Standing(span=span(0, 6), target=None, leaving=False), "fenced"),
        (ask(2, 4), Standing(span=span(0, 6), target=None, leaving=True), "leaving"),
        (ask(2, 4), Standing(span=span(0, 6), target=span(3, 9), leaving=False), "moving"),
        (ask(2, 4), Standing(span=span(0, 6), target=span(0, 6, "other"), leaving=False), "moving"),
    ],
)
def test_a_keeper_refuses_with_a_code(question: Hold, standing: Standing, code: str) -> None:
    k = Keeper()
    answer = k.asked("a", question, standing, 0.0)
    assert isinstance(answer, NotHeld)
    assert answer.code == code
    assert k.promised(0, 99, 0.0) is None


def test_a_keeper_that_grows_or_waits_for_a_return_may_promise() -> None:
    k = Keeper()
    assert isinstance(k.asked("a", ask(2, 4), Standing(span=span(0, 6), target=span(0, 9), leaving=False), 0.0), Held)
    leaving = Standing(span=span(0, 6), target=None, leaving=True)
    assert isinstance(k.asked("b", ask(2, 4, returns=True), leaving, 0.0), Held)


def test_a_hold_for_nothing_is_the_fault_of_the_asker() -> None:
    with pytest.raises(RemoteProtocolError, match="no range"):
        Keeper().asked("a", ask(4, 4), Standing(span=span(0, 6), target=None, leaving=False), 0.0)


def test_vectors() -> None:
    messages = {
        "hold": ask(2, 4),
        "hold-returns": ask(2, 4, returns=True),
        "held": Held(hold_ms=30_000),
        "not-held": NotHeld(code="moving", reason="this node is moving to other layers itself"),
    }
    cases = [Case(name, HOLDS.encode(message), message) for name, message in messages.items()]
    good = HOLDS.encode(messages["hold"])
    cases += [
        Case("unknown-tag", bytes.fromhex("a100187f")),
        Case("truncated", good[:-1]),
        Case("trailing", good + b"\0"),
        Case("layer-out-of-range", bytes.fromhex("a7000101616d02616d031904010419040205000600")),
        Case("empty", b""),
    ]
    hold("intent", cases, HOLDS.decode)


def test_the_specification_shows_the_transitions() -> None:
    text = (Path(intent.__file__).parent / "SPEC.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\w+) \| ([\w ]+) \|$", text.split("transitions -->")[1].split("<!--")[0], re.M)
    shown = {(state, event): set(after.split(" or ")) for state, event, after in rows if state != "State"}
    table = {(s.value, e.__name__): {a.value for a in after} for (s, e), after in intent.TRANSITIONS.items()}
    assert shown == table
