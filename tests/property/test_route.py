"""Route properties: a chain is whole, in order, made of what is served, and exists whenever the layers are."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.policy.route import NoRoute, plan_route
from protocols.advert.messages import DRAINING, LOADING, SERVING, Advert, RoundTrip, Serving, Span
from protocols.ids import PeerId
from tests.adverts import advert_named

LAYERS = 10
MODEL = Span(manifest="m", variant="v", first=0, last=LAYERS)


@st.composite
def views(draw: st.DrawFn) -> dict[PeerId, Advert]:
    view = {}
    for i in range(draw(st.integers(0, 7))):
        first = draw(st.integers(0, LAYERS - 1))
        span = Span(manifest="m", variant="v", first=first, last=draw(st.integers(first + 1, LAYERS)))
        state = draw(st.sampled_from((SERVING, SERVING, SERVING, DRAINING, LOADING)))
        view[PeerId(f"peer-{i}")] = advert_named(
            f"peer-{i}",
            incarnation=draw(st.integers(1, 3)),
            leaving=draw(st.sampled_from((False, False, True))),
            serving=Serving(
                state=state,
                span=span if state != LOADING else None,
                target=span if state == LOADING else None,
                decode_us=draw(st.integers(0, 100_000)),
                queue_us=draw(st.integers(0, 100_000)),
                sessions=draw(st.integers(0, 4)),
                max_sessions=4,
            ),
            round_trips=tuple(RoundTrip(peer=f"peer-{j}", us=draw(st.integers(0, 10**6))) for j in range(2)),
        )
    return view


@settings(max_examples=150)
@given(
    views(), st.integers(0, 1 << 32), st.sets(st.sampled_from([PeerId(f"peer-{i}") for i in range(7)]), max_size=2)
)
def test_a_route_is_a_whole_chain(view: dict[PeerId, Advert], seed: int, avoid: set[PeerId]) -> None:
    found = plan_route(view, MODEL, PeerId("peer-0"), seed, in_flight={PeerId("peer-1"): 2}, avoid=avoid)
    usable = {
        peer: a.serving.span
        for peer, a in view.items()
        if not a.leaving and peer not in avoid and a.serving and a.serving.state == SERVING and a.serving.span
    }
    whole = {layer for span in usable.values() for layer in range(span.first, span.last)} == set(range(LAYERS))
    if isinstance(found, NoRoute):
        assert not whole
        assert found.retry_ms > 0
        return
    assert whole
    assert found[0].first == 0
    assert found[-1].last == LAYERS
    assert all(before.last == after.first for before, after in itertools.pairwise(found))
    assert len({hop.peer for hop in found}) == len(found)
    for hop in found:
        span = usable[PeerId(hop.peer)]
        assert span.first <= hop.first < hop.last <= span.last
        assert hop.incarnation == view[PeerId(hop.peer)].incarnation
    again = plan_route(
        dict(reversed(view.items())), MODEL, PeerId("peer-0"), seed, in_flight={PeerId("peer-1"): 2}, avoid=avoid
    )
    assert again == found
