"""Routes: which chain of stages a session uses."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from meshnode.policy.chunking import chunks
from meshnode.policy.route import NoRoute, in_words, plan_route, round_trip_us
from protocols.advert.messages import DRAINING, LOADING, SERVING, Advert, RoundTrip, Serving, Span
from protocols.ids import PeerId
from protocols.pipe.messages import Hop
from tests.adverts import advert_named

ORIGIN = PeerId("origin")
MODEL = Span(manifest="m", variant="v", first=0, last=12)


def advert(
    name: str,
    first: int = 0,
    last: int = 0,
    *,
    state: str = SERVING,
    us: int = 1000,
    trips: dict[str, int] | None = None,
    addresses: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/1",),
    **serving: int,
) -> Advert:
    span = Span(manifest="m", variant="v", first=first, last=last)
    serves = Serving(
        state=state,
        span=span if state in (SERVING, DRAINING) else None,
        target=span if state == LOADING else None,
        decode_us=us * (last - first),
        **serving,
    )
    return advert_named(
        name,
        incarnation=7,
        addresses=addresses,
        serving=serves if last else None,
        round_trips=tuple(RoundTrip(peer=peer, us=trip) for peer, trip in (trips or {}).items()),
    )


def route(*adverts: Advert, seed: int = 1, **options: object) -> tuple[Hop, ...] | NoRoute:
    view = {PeerId(a.peer): a for a in (advert("origin"), *adverts)}
    return plan_route(view, MODEL, ORIGIN, seed, **options)  # type: ignore[arg-type]


def spans(found: tuple[Hop, ...] | NoRoute) -> list[tuple[str, int, int]]:
    assert not isinstance(found, NoRoute), found
    return [(hop.peer, hop.first, hop.last) for hop in found]


def test_a_chain_carries_the_incarnations() -> None:
    found = route(advert("a", 0, 5), advert("b", 5, 12))
    assert found == (
        Hop(peer="a", incarnation=7, first=0, last=5),
        Hop(peer="b", incarnation=7, first=5, last=12),
    )


def test_spans_are_cut_where_they_overlap() -> None:
    fast_first = spans(route(advert("a", 0, 9, us=100), advert("b", 3, 12, us=3000)))
    assert fast_first == [("a", 0, 9), ("b", 9, 12)]
    fast_last = spans(route(advert("a", 0, 9, us=3000), advert("b", 3, 12, us=100)))
    assert fast_last == [("a", 0, 3), ("b", 3, 12)]


def test_fewer_stages_win_between_equals() -> None:
    for seed in range(10):
        found = spans(route(advert("a", 0, 6), advert("b", 6, 12), advert("c", 0, 12), seed=seed))
        assert len(found) == 1 or "c" not in {peer for peer, _, _ in found}
    assert spans(route(advert("a", 0, 12), advert("b", 6, 12))) == [("a", 0, 12)]


def test_starting_at_home_saves_a_hop() -> None:
    view = {PeerId(a.peer): a for a in (advert("origin", 0, 12), *(advert(f"p{i}", 0, 12) for i in range(8)))}
    for seed in range(20):
        assert spans(plan_route(view, MODEL, ORIGIN, seed)) == [("origin", 0, 12)]


def test_a_far_peer_is_worse_than_a_slow_one() -> None:
    near = advert("near", 0, 12, us=2000, trips={"origin": 1000})
    far = advert("far", 0, 12, us=1000, trips={"origin": 90_000})
    assert all(spans(route(near, far, seed=seed))[0][0] == "near" for seed in range(10))


def test_own_work_in_flight_counts() -> None:
    a, b = advert("a", 0, 12), advert("b", 0, 12)
    assert all(spans(route(a, b, seed=s, in_flight={"a": 2}))[0][0] == "b" for s in range(10))


def test_a_full_peer_is_the_last_choice() -> None:
    full = advert("full", 0, 12, us=100, sessions=4, max_sessions=4)
    assert spans(route(full, advert("slow", 0, 12, us=5000)))[0][0] == "slow"
    assert spans(route(full))[0][0] == "full"


def test_load_spreads_over_many_peers() -> None:
    peers = [advert(f"p{i}", 0, 12) for i in range(6)]
    taken = Counter(spans(route(*peers, seed=seed))[0][0] for seed in range(200))
    assert len(taken) == 6
    assert max(taken.values()) < 100, "nobody draws all the load"


def test_why_there_is_no_route() -> None:
    nobody = route()
    assert nobody == NoRoute("layers 0 to 11 are held by nobody, and no node is loading", 10_000)
    loading = route(advert("a", 0, 6), advert("b", 6, 12, state=LOADING))
    assert loading == NoRoute("layers 6 to 11 are held by nobody; 1 node is loading", 2_000)
    one = route(advert("a", 0, 11))
    assert isinstance(one, NoRoute)
    assert one.reason.startswith("layer 11 is held by nobody")
    draining = route(advert("a", 0, 12, state=DRAINING))
    assert isinstance(draining, NoRoute)
    avoided = route(advert("a", 0, 6), advert("b", 6, 12), avoid={"b"})
    assert avoided == NoRoute("layers 6 to 11 are held only by peers that failed a moment ago (b)", 5_000)


def test_another_release_is_no_stage() -> None:
    view = {PeerId("a"): advert("a", 0, 12)}
    assert isinstance(plan_route(view, replace(MODEL, manifest="other"), ORIGIN, 1), NoRoute)
    assert isinstance(plan_route(view, replace(MODEL, variant="other"), ORIGIN, 1), NoRoute)


def test_round_trips() -> None:
    view = {
        PeerId("a"): advert("a", trips={"b": 500}, addresses=("/ip4/10.0.0.1/tcp/1",)),
        PeerId("b"): advert("b", trips={"a": 700}),
        PeerId("c"): advert("c"),
    }
    assert round_trip_us(view, PeerId("a"), PeerId("b")) == 500
    assert round_trip_us(view, PeerId("b"), PeerId("c")) == 0, "both on one machine"
    assert round_trip_us(view, PeerId("a"), PeerId("c")) == 150_000
    assert round_trip_us(view, PeerId("a"), PeerId("a")) == 0


def test_ranges_in_words() -> None:
    assert in_words([(0, 1)]) == "layer 0"
    assert in_words([(0, 10), (12, 13)]) == "layers 0 to 9 and layer 12"


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [(0, ()), (1, (1,)), (2, (2,)), (256, (256,)), (257, (255, 2)), (258, (256, 2)), (513, (256, 255, 2))],
)
def test_chunks(tokens: int, rows: tuple[int, ...]) -> None:
    assert chunks(tokens) == rows


@pytest.mark.parametrize(("tokens", "limit"), [(-1, 256), (5, 2)])
def test_chunks_refuse_nonsense(tokens: int, limit: int) -> None:
    with pytest.raises(ValueError, match="chunks of"):
        chunks(tokens, limit)
