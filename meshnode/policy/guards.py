"""Who keeps the layers that a node leaves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meshnode.model.fit import ModelFacts, Range
from meshnode.policy.placement import Node, runs


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


def abandoned(source: Range | None, target: Range, *, exclusive: bool) -> tuple[Range, ...]:
    """The layers of `source` that are without us after (or, if exclusive, during) the move."""
    if source is None:
        return ()
    return runs(layer for layer in range(*source) if exclusive or not target[0] <= layer < target[1])


def is_exclusive(facts: ModelFacts, node: Node, target: Range) -> bool:
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
