"""Any sequence of events leaves a round consistent, and no delta is taken twice."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.delta.messages import Position
from protocols.errors import LocalProtocolError
from protocols.round import events
from protocols.round.events import Fetch, Mix, Publish, Train
from protocols.round.machine import TRANSITIONS, RoundMachine, Rules, State
from protocols.round.schedule import Mode
from tests.deltas import made, peer_of, record

OTHERS = ("bob", "cat", "dan", "eve")
WAITING = {State.ADOPTING, State.GATHERING, State.EXCHANGING}
ANSWERS = {Train: events.Trained, Publish: events.Published, Mix: events.Mixed}


@st.composite
def arrivals(draw: st.DrawFn, adds: bool) -> events.Arrived:
    name, number = draw(st.sampled_from(OTHERS)), draw(st.integers(0, 12))
    fields = {"adds": True, "whole": made(f"{name} whole", number)} if adds else {}
    exchange = 0 if adds else draw(st.integers(0, 2))
    if adds:
        return events.Arrived(record(name, number, recent=8, **fields))
    return events.Arrived(record(name, number, exchange))


@settings(max_examples=150)
@given(st.sampled_from(Mode), st.integers(0, 3), st.data())
def test_any_events(mode: Mode, mixes: int, data: st.DataObject) -> None:
    """The node answers orders at once, after something else, or never; fetches succeed, fail, or stay away."""
    m = RoundMachine(peer_of("ann"), Rules(lineage="l", mode=mode, mixes=mixes, group=3))
    adds = mode is Mode.BROADCAST
    open_orders: list[events.Event] = [events.Begin()]
    fetches: list[Fetch] = []
    taken: set[tuple[str, Position]] = set()
    last = Position(-1, 0)
    now = 0.0
    for _ in range(data.draw(st.integers(1, 60))):
        now += 1.0
        kind = data.draw(
            st.sampled_from(("answer", "answer", "arrive", "fetched", "refused", "expired", "left", "odd"))
        )
        event: events.Event
        if kind == "answer" and open_orders:
            event = open_orders.pop()
        elif kind in ("fetched", "refused") and fetches:
            fetch = fetches.pop(data.draw(st.integers(0, len(fetches) - 1)))
            event = events.Fetched(fetch.peer, fetch.delta)
            if kind == "refused":
                event = events.Refused(fetch.peer, fetch.delta, "no")
        elif kind == "expired" and m.state in WAITING:
            event = events.Expired()
        elif kind == "left":
            event = events.Left(peer_of(data.draw(st.sampled_from(OTHERS))))
        elif kind == "odd":
            event = data.draw(
                st.sampled_from((events.Trained(), events.Mixed(), events.Published(), events.Expired()))
            )
            if m.expects(event):
                continue
        else:
            event = data.draw(arrivals(adds))
        before = (m.state, m.deadline, m.position)
        try:
            effects = m.handle(event, now)
        except LocalProtocolError:
            assert (before[0], type(event)) not in TRANSITIONS
            assert (m.state, m.deadline, m.position) == before
            continue
        assert m.state in TRANSITIONS[before[0], type(event)]
        assert (m.deadline is not None) == (m.state in WAITING)
        assert m.position >= before[2]
        for effect in effects:
            match effect:
                case Publish(position, _):
                    assert position > last, "one delta for each position"
                    last = position
                case Mix(inputs, adopts):
                    names = {(given.peer, given.position) for given in inputs}
                    assert len(names) == len(inputs) > 0
                    assert adopts or not names & taken
                    taken = set() if adopts and adds else taken | names
                case Fetch():
                    fetches.append(effect)
            if type(effect) in ANSWERS:
                assert not open_orders, "one order at a time"
                open_orders.append(ANSWERS[type(effect)]())
