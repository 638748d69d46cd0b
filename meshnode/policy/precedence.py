"""Who comes first when several nodes want to move at the same time.

Before anybody announced: at most `MOVERS` nodes move in one time slot, and every node computes who they are. Once two
have announced to leave the same layers: the one whose intent ranks higher.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Final

from meshnode.model.fit import ModelFacts, Range
from meshnode.policy.guards import guards_of, is_exclusive
from meshnode.policy.placement import Node, Plan, coverage_of

MOVERS: Final = 2
SLOT_MS: Final = 30_000  # the right to move first is drawn anew this often


def slot_of(wall_ms: int) -> int:
    return wall_ms // SLOT_MS


def slot_left_s(wall_ms: int) -> float:
    """Seconds until the next slot."""
    return (SLOT_MS - wall_ms % SLOT_MS) / 1000


def rank(peer: str, number: int) -> bytes:
    """Priority of a peer in a slot, or of its intent with this epoch; the higher one wins."""
    return sha256(f"meshnode/rank/1:{peer}:{number}".encode()).digest()


def movers(facts: ModelFacts, nodes: Sequence[Node], wanted: Plan, slot: int, *, protect: bool) -> frozenset[str]:
    """The peers whose turn it is: those whose move alone helps most, with disjoint present spans."""
    places = {n.peer: n.place for n in nodes if n.place is not None and not n.draining}
    choices = []
    for node in nodes:
        new = wanted.spans.get(node.peer)
        if node.span is None or node.target is not None or node.draining or new is None or new == node.span:
            continue
        if node.span[0] <= new[0] and new[1] <= node.span[1]:
            continue  # giving up layers alone helps nobody
        if protect and guards_of(nodes, node.peer, node.span, new, exclusive=is_exclusive(facts, node, new)).missing:
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
