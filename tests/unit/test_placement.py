"""The planner: spans from facts, whatever the order of the input."""

from __future__ import annotations

import pytest

from meshnode.bench.placement import case_of, measure, petals, planned
from meshnode.model.fit import ModelFacts, facts_of, tight_memory
from meshnode.policy.guards import abandoned, guards_of
from meshnode.policy.mesh_view import UNMEASURED_LAYER_US, coarse_us, nodes_of
from meshnode.policy.moves import Move, decide, still_right, unserved
from meshnode.policy.placement import Node, cover, plan, windows_of
from meshnode.policy.precedence import outranked, rank
from meshnode.policy.prediction import predict
from protocols.advert.messages import DRAINING, INTENT, LOADING, SERVING, Serving, Span
from protocols.ids import RAW, PeerId, cid_of
from protocols.manifest.messages import FileRef
from tests.adverts import advert_named
from tests.manifests import manifest_of

MB = 1 << 20


def model(layers: int = 30, *, layer: int = 2, embed: int = 17, head: int = 17, kv: int = 3) -> ModelFacts:
    """Sizes of SmolLM2-135M in int4, in MiB: heavy ends that share one file."""
    work = (1000,) * (layers - 1) + (1000 + 1000 * head // layer,)
    return ModelFacts((layer * MB,) * layers, embed * MB, head * MB, min(embed, head) * MB, kv * MB, work)


FLAT = ModelFacts((MB,) * 12, 0, 0, 0, 0, (1000,) * 12)


def node(name: str, layers: int = 4, **fields: object) -> Node:
    return Node(**{"peer": name, "memory_bytes": layers * MB, **fields})  # type: ignore[arg-type]


def test_facts_count_shared_ends_once() -> None:
    ends = FileRef(cid=cid_of(RAW, b"ends"), size=15 * MB)

    def file(name: str) -> FileRef:
        return ends if name in ("embed", "head") else FileRef(cid=cid_of(RAW, name.encode()), size=10 * MB)

    manifest = manifest_of(file, layers=12)
    facts, variant = facts_of(manifest, "int4"), manifest.variants["int4"]
    for first, last in ((0, 12), (0, 5), (5, 12), (3, 4)):
        assert facts.weights(first, last) == variant.span_bytes(first, last)
    assert facts.need(3, 4) - facts.weights(3, 4) == 2048 * 2 * 1 * 16 * 4
    assert facts.work == (1000,) * 11 + (2500,)


def test_reach_is_what_fits() -> None:
    facts = model()
    assert facts.reach(0, 17 * MB, 0) == 0
    assert facts.reach(0, 27 * MB, 0) == 2
    assert facts.reach(5, 27 * MB, 0) == 10
    assert facts.reach(5, 27 * MB, 3) == 8
    assert facts.reach(25, 27 * MB, 0) == 29, "the head does not fit beside four layers"
    assert windows_of(facts, 0, 0) == ()


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 8])
def test_memory_for_a_share_only_needs_all_nodes(nodes: int) -> None:
    facts = model()
    share = tight_memory(facts, nodes)
    mesh = [Node(peer=f"p{i}", memory_bytes=share) for i in range(nodes)]
    assert plan(facts, mesh).holes == ()
    assert plan(facts, mesh[1:]).holes != () if nodes > 1 else True
    assert all(facts.need(*span) <= share for span in plan(facts, mesh).spans.values())


def test_a_node_that_can_hold_everything_does() -> None:
    facts = model()
    nodes = [Node(peer="big", memory_bytes=400 * MB), Node(peer="small", memory_bytes=60 * MB)]
    assert plan(facts, nodes).spans["big"] == (0, 30)


def test_a_node_without_room_for_a_layer_gets_nothing() -> None:
    assert plan(FLAT, [node("none", 0), node("all", 12)]).spans == {"all": (0, 12)}


def test_a_chain_does_not_overlap() -> None:
    spans = plan(FLAT, [node("a", 8), node("b", 8)]).spans
    assert sorted(spans.values()) == [(0, 6), (6, 12)]


def test_a_slow_node_of_a_chain_takes_less() -> None:
    spans = plan(FLAT, [node("fast", 9, rate=3_000_000), node("slow", 9, rate=1_000_000)]).spans
    assert spans["fast"][1] - spans["fast"][0] == 9
    assert spans["slow"][1] - spans["slow"][0] == 3


def test_spares_keep_all_that_they_hold() -> None:
    spans = plan(FLAT, [node(name, 6) for name in "abcd"]).spans
    assert sorted(spans.values()) == [(0, 6), (0, 6), (6, 12), (6, 12)]


def test_a_joiner_gets_the_worst_covered_layers_and_nobody_moves() -> None:
    placed = [node("a", span=(0, 4)), node("b", span=(4, 8)), node("c", span=(8, 12), rate=100)]
    after = plan(FLAT, [*placed, node("new")])
    assert after.spans == {"a": (0, 4), "b": (4, 8), "c": (8, 12), "new": (8, 12)}


def test_greedy_placement_fails_where_an_exact_cover_exists() -> None:
    """Only [small, large, small] fits: the ends are heavy."""
    facts = ModelFacts((10,) * 6, 10, 30, 0, 0, (1000,) * 6)
    windows = [windows_of(facts, memory, 0) for memory in (20, 40, 40)]
    found = cover(windows, 6)
    assert found is not None
    assert [index for index, _ in found] == [0, 1, 2] or [index for index, _ in found] == [0, 2, 1]
    nodes = [Node(peer=str(i), memory_bytes=memory) for i, memory in enumerate((40, 40, 20))]
    assert plan(facts, nodes).holes == ()
    assert cover([windows_of(facts, 20, 0)] * 3, 6) is None


def test_a_hole_moves_one_spare() -> None:
    placed = [node("a", span=(0, 4)), node("b", span=(4, 8)), node("c", span=(0, 4))]
    after = plan(FLAT, placed)
    assert sorted(after.spans.values()) == [(0, 4), (4, 8), (8, 12)]
    assert after.spans["b"] == (4, 8)


def test_everybody_may_move_only_when_nothing_answers() -> None:
    placed = [node("a", span=(1, 5)), node("b", span=(5, 9)), node("c", span=(8, 12))]
    assert plan(FLAT, placed).reshuffled
    assert plan(FLAT, placed).holes == ()
    kept = plan(FLAT, placed, reshuffle=False)
    assert not kept.reshuffled
    assert kept.holes == ((0, 1),)


def test_decide_places_stays_and_repairs() -> None:
    assert isinstance(decide(FLAT, [node("a", 12)], "a", 0), Move)
    served = [node("a", span=(0, 4)), node("b", span=(4, 8)), node("c", span=(8, 12))]
    for name in "abc":
        assert decide(FLAT, served, name, 0) is None
    assert decide(FLAT, served, "stranger", 0) is None
    broken = [node("a", span=(0, 4)), node("b", span=(4, 8)), node("c", span=(0, 4))]
    moves = [d for name in "abc" if isinstance(d := decide(FLAT, broken, name, 0), Move)]
    assert [(m.target, m.urgent, m.repair, m.exclusive) for m in moves] == [((8, 12), True, True, True)]


def test_at_most_two_move_for_speed() -> None:
    # Everything is served once by slow nodes; spare fast nodes stand at the wrong places.
    slow = [node(f"slow-{i}", span=(4 * i, 4 * i + 4), rate=1000) for i in range(3)]
    fast = [node(f"fast-{i}", span=(4 * (i % 2), 4 * (i % 2) + 4), rate=100_000) for i in range(6)]
    nodes = [*slow, *fast]
    for slot in range(4):
        moves = {n.peer: d for n in nodes if isinstance(d := decide(FLAT, nodes, n.peer, slot), Move)}
        assert 1 <= len(moves) <= 2
        assert all(m.target == (8, 12) and not m.urgent and not m.repair for m in moves.values())
        assert all(peer.startswith("fast") for peer in moves)


def test_small_gains_move_nobody() -> None:
    nodes = [node("a", 6, span=(0, 6)), node("b", 6, span=(6, 12)), node("c", 6, span=(0, 6), rate=100_000)]
    assert all(decide(FLAT, nodes, n.peer, 0) is None for n in nodes)


def test_leaving_needs_somebody_who_stays() -> None:
    nodes = [
        node("me", 6, span=(0, 6)),
        node("b", 6, span=(0, 4)),
        node("c", 6, span=(2, 8), target=(3, 9)),
        node("d", 6, span=(0, 6), draining=True),
    ]
    assert abandoned((0, 6), (4, 10), exclusive=False) == ((0, 4),)
    assert abandoned((0, 6), (4, 10), exclusive=True) == ((0, 6),)
    assert abandoned(None, (4, 10), exclusive=True) == ()
    guards = guards_of(nodes, "me", (0, 6), (6, 12), exclusive=False)
    assert [(g.peer, g.layers, g.returns) for g in guards.holders] == [("b", (0, 4), False), ("c", (4, 6), False)]
    assert guards.missing == ()
    assert guards_of(nodes, "me", (0, 9), (9, 12), exclusive=False).missing == ((8, 9),)


def test_a_draining_node_guards_layers_until_we_are_back() -> None:
    nodes = [node("me", 6, span=(0, 6)), node("b", 6, span=(0, 3)), node("d", 6, span=(3, 9), draining=True)]
    back = guards_of(nodes, "me", (0, 6), (3, 9), exclusive=True)
    assert back.missing == ()
    assert [(g.peer, g.layers, g.returns) for g in back.holders] == [("d", (3, 6), True), ("b", (0, 3), False)]
    assert guards_of(nodes, "me", (0, 6), (6, 12), exclusive=True).missing == ((3, 6),)


def test_layers_without_a_server() -> None:
    nodes = [node("a", span=(0, 6)), node("b", span=(4, 8)), node("c", target=(8, 12))]
    assert unserved(FLAT, nodes) == ((8, 12),)


def test_the_higher_rank_comes_first() -> None:
    nodes = [node("me", 6, span=(0, 6), target=(6, 12), epoch=1), node("b", 6, span=(0, 6), target=(6, 12), epoch=1)]
    first = max(("me", "b"), key=lambda peer: rank(peer, 1))
    assert outranked(nodes, "me", 1, [(0, 6)]) == ("b" if first == "b" else None)
    assert outranked(nodes, "b", 1, [(0, 6)]) == ("me" if first == "me" else None)


def test_an_intent_is_dropped_when_the_mesh_answers_meanwhile() -> None:
    nodes = [
        node("me", span=(0, 4), target=(8, 12)),
        node("b", span=(4, 8)),
        node("c", span=(8, 12)),
    ]
    why = still_right(FLAT, nodes, "me", 1, protect=False)
    assert why is not None
    assert "better" in why or "answers" in why
    assert still_right(FLAT, [node("me", target=(0, 4))], "me", 1, protect=False) is None


def test_prediction_in_words() -> None:
    one = predict(FLAT, {"a": (0, 12)}, {"a": 2000}, {"a": 12 * MB})
    assert one.text == "about 40 tok/s on one node"
    two = predict(FLAT, {"a": (0, 6), "b": (6, 12)}, {"a": 2000, "b": 2000}, {"a": 12 * MB, "b": 6 * MB})
    assert two.text == "alone 40 tok/s, over two nodes 39"
    assert two.stages == (("a", (0, 6)), ("b", (6, 12)))
    tight = predict(FLAT, {"a": (0, 6), "b": (6, 12)}, {"a": 2000, "b": 2000}, {"a": 6 * MB, "b": 6 * MB})
    assert "no node has the memory" in tight.text
    none = predict(FLAT, {"a": (0, 6)}, {"a": 2000}, {"a": 6 * MB})
    assert none.mesh_milli == 0
    assert "missing" in none.text


def test_the_fastest_chain_uses_the_fast_node_for_the_overlap() -> None:
    found = predict(FLAT, {"a": (0, 9), "b": (3, 12)}, {"a": 1000, "b": 9000}, {"a": 9 * MB, "b": 9 * MB})
    assert found.stages == (("a", (0, 9)), ("b", (9, 12)))


def test_adverts_become_nodes() -> None:
    def span(first: int, last: int, manifest: str = "m") -> Span:
        return Span(manifest=manifest, variant="int4", first=first, last=last)

    moving = Serving(state=SERVING, span=span(0, 4), target=span(4, 8), epoch=3)
    others = {
        "b": Serving(state=INTENT, span=None, target=span(4, 8)),
        "c": Serving(state=SERVING, span=span(0, 4, "old"), target=None),
        "f": Serving(state=DRAINING, span=span(8, 12), target=None),
        "g": Serving(state=LOADING, span=None, target=span(8, 99)),
    }
    view = {PeerId(name): advert_named(name, memory_bytes=100, serving=serving) for name, serving in others.items()}
    view[PeerId("a")] = advert_named("a", memory_bytes=100, serving=moving, layer_decode_us=500)
    view[PeerId("d")] = advert_named("d", memory_bytes=0)
    view[PeerId("e")] = advert_named("e", memory_bytes=100, leaving=True)
    nodes = {n.peer: n for n in nodes_of(view, "m", "int4", 12)}
    assert sorted(nodes) == ["a", "b", "c", "f", "g"]
    assert (nodes["a"].span, nodes["a"].target, nodes["a"].epoch) == ((0, 4), (4, 8), 3)
    assert nodes["a"].rate == 1_000_000_000 // 512
    assert nodes["b"].tentative
    assert nodes["b"].rate == nodes["a"].rate, "not measured yet: the median of the others"
    assert nodes["c"].span is None
    assert nodes["f"].draining
    assert nodes["g"].target is None, "outside the model"
    alone = nodes_of({PeerId("b"): view[PeerId("b")]}, "m", "int4", 12)
    assert alone[0].rate == 1_000_000_000 // coarse_us(UNMEASURED_LAYER_US)


@pytest.mark.slow
def test_the_planner_reaches_the_optimum_nearly() -> None:
    """A few of the seeded cases of `python -m meshnode.bench.placement`, with little time for the MILP."""
    result = measure(range(3), limit_s=1.0)
    assert result["summary"]["plan"]["mean"] >= 0.95
    assert result["summary"]["plan"]["min"] >= 0.90


def test_the_planner_beats_the_rule_of_petals() -> None:
    for seed in range(20, 26):
        case = case_of(seed)
        assert planned(case) >= petals(case, rebalance=True) >= petals(case, rebalance=False)


def test_noise_of_a_measurement_is_rounded_away() -> None:
    assert {coarse_us(us) for us in range(870, 1150)} <= {1024, 724}
    assert [coarse_us(us) for us in (1, 2, 3, 1000, 1450, 2000)] == [1, 2, 2, 1024, 1447, 2048]
    steps = [coarse_us(us) for us in range(1, 5000)]
    assert steps == sorted(steps)
