"""When a node moves: what it should serve next, and whether it may leave what it serves now.

A move is worth it when a layer has no holder, or when the worst covered layer reaches less than `KEEP` of what
a fresh plan would give it. At most `MOVERS` nodes move in one time slot; every node computes who they are, and
only a node that finds itself among them acts. While the mesh answers (every layer is served), no node leaves a
layer that it alone serves. While it does not answer there is nothing to protect, and all nodes go to their
places at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Final

from meshnode.model.facts import ModelFacts, Range
from meshnode.policy.placement import Node, Plan, coverage_of, plan, runs, windows_of

KEEP_MILLI: Final = 850  # stay while the bottleneck is at least this part (thousandths) of the planned one
MOVERS: Final = 2
SLOT_MS: Final = 30_000  # the right to move first is drawn anew this often


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


@dataclass(frozen=True, slots=True)
class Guard:
    """A peer that is to hold these layers; `returns`: only until we serve them again."""

    peer: str
    layers: Range
    returns: bool


@dataclass(frozen=True, slots=True)
class Guards:
    """Who keeps the layers that we leave."""

    holders: tuple[Guard, ...]
    missing: tuple[Range, ...]  # nobody could: these must not be left


def unserved(facts: ModelFacts, nodes: Iterable[Node]) -> tuple[Range, ...]:
    """Runs of layers that nobody serves at this moment, whatever was announced."""
    covered = {layer for node in nodes if node.span for layer in range(*node.span)}
    return runs(layer for layer in range(facts.layers) if layer not in covered)


def slot_of(wall_ms: int) -> int:
    return wall_ms // SLOT_MS


def slot_left_s(wall_ms: int) -> float:
    """Seconds until the next slot."""
    return (SLOT_MS - wall_ms % SLOT_MS) / 1000


def rank(peer: str, number: int) -> bytes:
    """Priority of a peer in a slot, or of its intent with this epoch; the higher one wins."""
    return sha256(f"meshnode/rank/1:{peer}:{number}".encode()).digest()


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


def _movers(facts: ModelFacts, nodes: Sequence[Node], wanted: Plan, slot: int, *, protect: bool) -> frozenset[str]:
    """The peers whose turn it is: those whose move alone helps most, with disjoint present spans."""
    places = {n.peer: n.place for n in nodes if n.place is not None and not n.draining}
    choices = []
    for node in nodes:
        new = wanted.spans.get(node.peer)
        if node.span is None or node.target is not None or node.draining or new is None or new == node.span:
            continue
        if node.span[0] <= new[0] and new[1] <= node.span[1]:
            continue  # giving up layers alone helps nobody
        if protect and guards_of(nodes, node.peer, node.span, new, exclusive=_exclusive(facts, node, new)).missing:
            continue
        after = coverage_of(facts, nodes, {**places, node.peer: new})
        key = (sorted(after), rank(node.peer, slot))
        choices.append((key, node.peer, node.span))
    choices.sort(reverse=True)
    chosen: list[tuple[str, Range]] = []
    for _, peer, span in choices:
        if len(chosen) < MOVERS and all(span[1] <= other[0] or other[1] <= span[0] for _, other in chosen):
            chosen.append((peer, span))
    return frozenset(peer for peer, _ in chosen)


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
        if not everybody and me not in _movers(facts, view, wanted, slot, protect=not urgent):
            return None  # others move first
    exclusive = _exclusive(facts, mine, target)
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
    exclusive = _exclusive(facts, mine, mine.target)
    leaving = abandoned(mine.span, mine.target, exclusive=exclusive)
    if not leaving:
        return None
    if not unserved(facts, nodes) and not protect:
        return "by now the mesh answers, and must not lose the layers that this node serves"
    if protect:
        missing = guards_of(nodes, me, mine.span, mine.target, exclusive=exclusive).missing
        if missing:
            return f"nobody else keeps layers {missing[0][0]} to {missing[0][1] - 1}"
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


def abandoned(source: Range | None, target: Range, *, exclusive: bool) -> tuple[Range, ...]:
    """The layers of `source` that are without us after (or, if exclusive, during) the move."""
    if source is None:
        return ()
    return runs(layer for layer in range(*source) if exclusive or not target[0] <= layer < target[1])


def _exclusive(facts: ModelFacts, node: Node, target: Range) -> bool:
    """Whether the node's memory can't hold its span and the target at the same time."""
    return node.span is not None and facts.need(*node.span) + facts.need(*target) > node.memory_bytes


def guards_of(nodes: Iterable[Node], me: str, source: Range, target: Range, *, exclusive: bool) -> Guards:
    """Peers that together serve all layers we leave and have not announced to leave them.

    For layers that we serve again after an exclusive move, a peer that drains is good enough: it stays until
    others have its layers.
    """
    able: dict[tuple[str, bool], set[int]] = {}
    back = set(range(*source)) & set(range(*target)) if exclusive else set()
    for node in sorted(nodes, key=lambda n: n.peer):
        if node.peer == me or node.span is None:
            continue
        kept = set(range(*node.span))
        if node.target is not None:
            kept &= set(range(*node.target))
        able[node.peer, True] = kept & back
        if not node.draining:
            able[node.peer, False] = kept - back
    open_layers = {layer for span in abandoned(source, target, exclusive=exclusive) for layer in range(*span)}
    holders: list[Guard] = []
    while open_layers:
        best = max(able, key=lambda a: (len(able[a] & open_layers), a), default=None)
        if best is None or not able[best] & open_layers:
            break
        holders += [Guard(best[0], span, best[1]) for span in runs(sorted(able[best] & open_layers))]
        open_layers -= able[best]
    return Guards(tuple(holders), runs(sorted(open_layers)))


def outranked(nodes: Iterable[Node], me: str, epoch: int, leaving: Sequence[Range]) -> str | None:
    """A serving peer whose live intent leaves some of the same layers and has priority over ours."""
    ours = {layer for span in leaving for layer in range(*span)}
    for node in sorted(nodes, key=lambda n: n.peer):
        if node.peer == me or node.span is None or node.target is None:
            continue
        theirs = set(range(*node.span)) - set(range(*node.target))
        if ours & theirs and rank(node.peer, node.epoch) > rank(me, epoch):
            return node.peer
    return None
