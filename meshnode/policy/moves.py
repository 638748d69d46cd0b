"""When a node moves: what it should serve next, and whether it may leave what it serves now.

A move is worth it when a layer has no holder, or when the worst covered layer reaches less than `KEEP` of what
a fresh plan would give it. Only a node whose turn it is acts (`precedence.py`). While the mesh answers (every
layer is served), no node leaves a layer that it alone serves. While it does not answer there is nothing to
protect, and all nodes go to their places at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from meshnode.model.fit import ModelFacts, Range
from meshnode.policy.guards import abandoned, guards_of, is_exclusive
from meshnode.policy.placement import Node, Plan, coverage_of, plan, runs, windows_of
from meshnode.policy.precedence import movers, outranked
from protocols.words import layers

KEEP_MILLI: Final = 850  # stay while the bottleneck is at least this part (thousandths) of the planned one


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Go to `target`.

    exclusive: memory can't hold both, so the old span goes before the new one comes (break before make).
    urgent: no complete chain is served, so nobody loses anything while we move.
    repair: closes a hole that is there or opens when a draining node has left; else the move is for speed.
    """

    target: Range
    source: Range | None
    exclusive: bool
    urgent: bool
    repair: bool


def unserved(facts: ModelFacts, nodes: Iterable[Node]) -> tuple[Range, ...]:
    """Runs of layers that nobody serves at this moment, whatever was announced."""
    covered = {layer for node in nodes if node.span for layer in range(*node.span)}
    return runs(layer for layer in range(facts.layers) if layer not in covered)


def best_possible(facts: ModelFacts, nodes: Iterable[Node]) -> int:
    """An upper bound for any plan's bottleneck: all work that the nodes can do, spread evenly."""
    total = 0
    for node in nodes:
        windows = windows_of(facts, node.memory_bytes, node.max_layers)
        total += max((node.rate * 1000 * (b - a) // facts.span_work(a, b) for a, b in windows), default=0)
    return total // facts.layers


def wanted_plan(facts: ModelFacts, nodes: Sequence[Node]) -> Plan:
    """The plan that the mesh should move to from where it is: the present places, unless a layer is uncovered
    or a better arrangement is worth the moves."""
    live = [n for n in nodes if not n.draining]
    broken = bool(unserved(facts, nodes))
    kept = plan(facts, live, reshuffle=broken)
    if broken or kept.holes or any(n.target for n in live):
        return kept  # first everything is served and everybody has arrived, then it gets better
    if kept.bottleneck * 1000 >= best_possible(facts, live) * KEEP_MILLI:
        return kept
    better = plan(facts, live, ideal=True, reshuffle=False)
    return better if kept.bottleneck * 1000 < better.bottleneck * KEEP_MILLI else kept


def decide(facts: ModelFacts, nodes: Sequence[Node], me: str, slot: int) -> Move | None:
    """Where the node `me` should go now, given what everybody advertised (itself included); None: nowhere.

    While it has an announced target, the answer says whether that is still right: None, or another Move.
    """
    mine = next((n for n in nodes if n.peer == me), None)
    if mine is None or mine.draining:
        return None
    view = nodes
    if mine.place is None and all(n.span is None and (n.target is None or n.tentative) for n in nodes):
        # A cold start: everybody plans at the same moment. Who announced a few milliseconds earlier must not
        # change what the others compute.
        view = [replace(n, target=None, tentative=False) for n in nodes]
    wanted = wanted_plan(facts, view)
    target = wanted.spans.get(me)  # None: not even one layer fits into its memory
    if target is None or target == mine.place:
        return None
    urgent = bool(unserved(facts, nodes))
    if mine.span is None:
        return Move(target=target, source=None, exclusive=False, urgent=urgent, repair=urgent)
    if mine.target is None or mine.target != target:
        everybody = wanted.reshuffled and urgent
        # A node that already announced is judged as if it had not: its own intent is what is in question.
        view = [n if n.peer != me else replace(n, target=None) for n in nodes]
        if not everybody and me not in movers(facts, view, wanted, slot, protect=not urgent):
            return None  # others move first
    exclusive = is_exclusive(facts, mine, target)
    places = {n.peer: n.place for n in nodes if n.place is not None and not n.draining}
    repair = urgent or not all(coverage_of(facts, nodes, places))
    return Move(target=target, source=mine.span, exclusive=exclusive, urgent=urgent, repair=repair)


def still_right(facts: ModelFacts, nodes: Sequence[Node], me: str, epoch: int, *, protect: bool) -> str | None:
    """Whether the announced move of `me` should go on, given the newest view (with its target): None, or why not.

    Args:
      protect: the move was judged to need the promises of others, because the mesh answered.
    """
    mine = next((n for n in nodes if n.peer == me), None)
    if mine is None or mine.target is None:
        return "this node has announced nothing"
    # A node that serves is judged from where it is: is the move still wanted? One that serves nothing is judged
    # from where it would be: does it have to be elsewhere?
    view = nodes if mine.span is None else [n if n.peer != me else replace(n, target=None) for n in nodes]
    if wanted_plan(facts, view).spans.get(me) != mine.target:
        return "by now another place serves the mesh better"
    if mine.span is None:
        return None
    exclusive = is_exclusive(facts, mine, mine.target)
    leaving = abandoned(mine.span, mine.target, exclusive=exclusive)
    if not leaving:
        return None
    if not unserved(facts, nodes) and not protect:
        return "by now the mesh answers, and must not lose the layers that this node serves"
    if protect:
        missing = guards_of(nodes, me, mine.span, mine.target, exclusive=exclusive).missing
        if missing:
            return f"nobody else keeps {layers(*missing[0])}"
        rival = outranked(nodes, me, epoch, leaving)
        if rival is not None:
            return f"{rival} leaves some of the same layers and comes first"
    return None


def may_leave(facts: ModelFacts, nodes: Sequence[Node], me: str, span: Range, *, promised: bool) -> bool:
    """Whether a draining node can go: others serve its layers, or never can.

    Args:
      promised: it has promised somebody to keep layers.
    """
    others = [node for node in nodes if node.peer != me and not node.draining]
    if not others or wanted_plan(facts, others).holes:
        return True  # whoever got a promise relied on a mesh that ends anyway
    covered = {layer for node in others if node.span for layer in range(*node.span)}
    return not promised and all(layer in covered for layer in range(*span))
