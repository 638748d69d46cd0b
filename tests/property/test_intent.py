"""Any sequence of events leaves a mover consistent; damaged bytes are refused or are another message."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.advert.messages import Span
from protocols.errors import LocalProtocolError
from protocols.intent import machine as intent
from protocols.intent.machine import TRANSITIONS, Mover, State, Want

SPAN = Span(manifest="m", variant="v", first=0, last=4)
WANTS = st.builds(
    Want,
    target=st.just(SPAN),
    source=st.none() | st.just(SPAN),
    leaves=st.booleans(),
    exclusive=st.booleans(),
    wait_s=st.floats(0, 10),
)
EVENTS = st.one_of(
    WANTS,
    st.sampled_from(
        (
            intent.Expired(),
            intent.Confirmed(),
            intent.Refused("no"),
            intent.Guarded(),
            intent.Loaded(),
            intent.Failed("broken"),
            intent.Cancelled("over"),
        )
    ),
)
WAITING = {State.ANNOUNCED, State.ASKING, State.LOADING, State.PARTING, State.PAUSED}


@settings(max_examples=200)
@given(st.lists(EVENTS, max_size=40), st.floats(0, 0.999))
def test_any_events(events: list[intent.Event], draw: float) -> None:
    m = Mover(lambda: draw)
    now, announced, loading, released = 0.0, False, False, False
    for event in events:
        now += 0.5
        before = (m.state, m.deadline, m.epoch, m.want, m.failures)
        try:
            effects = m.handle(event, now)
        except LocalProtocolError:
            assert (before[0], type(event)) not in TRANSITIONS
            assert (m.state, m.deadline, m.epoch, m.want, m.failures) == before
            continue
        assert m.state in TRANSITIONS[before[0], type(event)]
        assert (m.deadline is not None) == (m.state in WAITING)
        assert (m.want is not None) == (m.state not in (State.RESTING, State.PAUSED))
        assert m.epoch >= before[2]
        for effect in effects:
            match effect:
                case intent.Announce():
                    assert not announced
                    announced = True
                case intent.Withdraw():
                    assert announced
                    announced = False
                case intent.Load():
                    assert announced
                    assert not loading
                    loading = True
                case intent.Vacate():
                    assert before[3] is not None
                    assert before[3].exclusive
                    assert not before[3].leaves or isinstance(event, intent.Guarded), "left without a promise"
                    released = True
                case intent.Switch():
                    assert before[3] is not None
                    assert not before[3].leaves or released or isinstance(event, intent.Guarded)
                    announced = loading = released = False
                case intent.Discard():
                    assert loading
                    loading = released = False
        assert loading == (m.state in (State.LOADING, State.PARTING))
