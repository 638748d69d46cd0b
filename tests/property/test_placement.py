"""Placement properties: the same plan for everybody, a cover whenever there is one, no hole by a move."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.model.fit import ModelFacts, Range
from meshnode.policy.chunking import chunks
from meshnode.policy.mesh_view import nodes_of
from meshnode.policy.moves import Move, decide
from meshnode.policy.placement import Node, cover, plan, windows_of
from protocols.advert.messages import SERVING, Serving, Span
from protocols.ids import PeerId
from tests.adverts import advert_named

MB = 1_000_000


@st.composite
def models(draw: st.DrawFn) -> ModelFacts:
    layers = draw(st.integers(1, 12))
    sizes = tuple(draw(st.lists(st.integers(1, 10), min_size=layers, max_size=layers)))
    embed, head = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    shared = draw(st.sampled_from((0, min(embed, head))))
    return ModelFacts(sizes, embed, head, shared, draw(st.integers(0, 3)), tuple(100 * s + 1 for s in sizes))


@st.composite
def meshes(draw: st.DrawFn, most: int = 7) -> tuple[ModelFacts, list[Node]]:
    facts = draw(models())
    spans = st.tuples(st.integers(0, facts.layers - 1), st.integers(1, facts.layers)).filter(lambda s: s[0] < s[1])
    nodes = [
        Node(
            peer=f"peer-{i}",
            memory_bytes=draw(st.integers(0, 120)),
            max_layers=draw(st.sampled_from((0, 0, 1, 3))),
            rate=draw(st.integers(1, 10**7)),
            span=draw(st.none() | spans),
            target=draw(st.none() | st.none() | spans),
            draining=draw(st.sampled_from((False, False, False, True))),
        )
        for i in range(draw(st.integers(0, most)))
    ]
    return facts, nodes


@settings(max_examples=60)
@given(meshes(), st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_the_same_plan_in_any_order(
    mesh: tuple[ModelFacts, list[Node]], rng: random.Random, ideal: bool, reshuffle: bool
) -> None:
    facts, nodes = mesh
    first = plan(facts, nodes, ideal=ideal, reshuffle=reshuffle)
    decisions = {n.peer: decide(facts, nodes, n.peer, 3) for n in nodes}
    shuffled = list(nodes)
    rng.shuffle(shuffled)
    plan.__globals__["_plan"].cache_clear()
    assert plan(facts, shuffled, ideal=ideal, reshuffle=reshuffle).spans == first.spans
    assert {n.peer: decide(facts, shuffled, n.peer, 3) for n in nodes} == decisions


def test_a_thousand_orders_of_the_same_adverts() -> None:
    """What all nodes compute from adverts that reached them in their own order."""
    rng = random.Random(1)
    facts = ModelFacts((10 * MB,) * 24, 15 * MB, 15 * MB, 15 * MB, MB, (1000,) * 23 + (2500,))
    adverts = []
    for i in range(9):
        span = Span(manifest="m", variant="v", first=2 * i, last=2 * i + 4)
        adverts.append(
            advert_named(
                f"peer-{i}",
                memory_bytes=rng.randrange(40, 90) * MB,
                layer_decode_us=rng.randrange(300, 3000),
                serving=Serving(state=SERVING, span=span, target=None) if i % 2 else None,
            )
        )
    plans = set()
    for turn in range(1000):
        rng.shuffle(adverts)
        nodes = nodes_of({PeerId(a.peer): a for a in adverts}, "m", "v", 24)
        if turn % 100 == 0:
            plan.__globals__["_plan"].cache_clear()
        plans.add(tuple(sorted(plan(facts, nodes, ideal=True).spans.items())))
    assert len(plans) == 1


@settings(max_examples=60)
@given(meshes())
def test_a_plan_respects_every_limit(mesh: tuple[ModelFacts, list[Node]]) -> None:
    facts, nodes = mesh
    fresh = [Node(peer=n.peer, memory_bytes=n.memory_bytes, max_layers=n.max_layers, rate=n.rate) for n in nodes]
    made = plan(facts, fresh)
    for n in fresh:
        span = made.spans.get(n.peer)
        if span is None:
            assert windows_of(facts, n.memory_bytes, n.max_layers) == ()
            continue
        assert 0 <= span[0] < span[1] <= facts.layers
        assert facts.need(*span) <= n.memory_bytes
        assert not n.max_layers or span[1] - span[0] <= n.max_layers
    covered = {layer for span in made.spans.values() for layer in range(*span)}
    assert {layer for hole in made.holes for layer in range(*hole)} == set(range(facts.layers)) - covered


def _coverable(facts: ModelFacts, nodes: list[Node]) -> bool:
    """By trying every order of the nodes along the layers."""
    for order in itertools.permutations(nodes):
        at = 0
        for n in order:
            at = max(at, facts.reach(at, n.memory_bytes, n.max_layers)) if at < facts.layers else at
        if at == facts.layers:
            return True
    return False


@settings(max_examples=80)
@given(meshes(most=5))
def test_a_cover_is_found_whenever_there_is_one(mesh: tuple[ModelFacts, list[Node]]) -> None:
    facts, nodes = mesh
    live = [n for n in nodes if not n.draining]
    feasible = _coverable(facts, live)
    exact = cover([windows_of(facts, n.memory_bytes, n.max_layers) for n in live], facts.layers)
    assert (exact is not None) == feasible
    if feasible:
        assert plan(facts, live).holes == ()


@settings(max_examples=30)
@given(st.integers(2, 16), st.randoms(use_true_random=False))
def test_just_enough_memory_is_enough(count: int, rng: random.Random) -> None:
    """Up to sixteen nodes with memory for exactly one chain, slack under one layer, in any order."""
    layers = rng.randrange(count, 40)
    facts = ModelFacts((10,) * layers, rng.randrange(30), rng.randrange(30), 0, 1, (1000,) * layers)
    cuts = [0, *sorted(rng.sample(range(1, layers), count - 1)), layers]
    limits = [facts.need(a, b) + rng.randrange(10) for a, b in itertools.pairwise(cuts)]
    rng.shuffle(limits)
    assert plan(facts, [Node(peer=f"peer-{i}", memory_bytes=m) for i, m in enumerate(limits)]).holes == ()


@settings(max_examples=60)
@given(meshes())
def test_no_move_for_speed_or_order_uncovers_a_layer(mesh: tuple[ModelFacts, list[Node]]) -> None:
    """In a mesh that answers, everybody who may move can go at once and nothing gets lost but by a leaver."""
    facts, drawn = mesh
    nodes = [n for n in drawn if not n.draining]
    nodes.append(Node(peer="whole", memory_bytes=10**6, span=(0, facts.layers)))
    moves = {n.peer: d for n in nodes if isinstance(d := decide(facts, nodes, n.peer, 0), Move)}
    assert "whole" not in moves
    assert not any(move.urgent for move in moves.values())
    after: list[Range] = [moves[n.peer].target if n.peer in moves else n.span for n in nodes if n.span]
    assert {layer for span in after for layer in range(*span)} == set(range(facts.layers))


@settings(max_examples=200)
@given(st.integers(0, 5000), st.integers(3, 600))
def test_chunks_add_up_and_have_no_single_row(tokens: int, limit: int) -> None:
    rows = chunks(tokens, limit)
    assert sum(rows) == tokens
    assert all(2 <= r <= limit for r in rows) or rows == (1,)
