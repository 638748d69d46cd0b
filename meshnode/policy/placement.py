"""Which node serves which layers: a pure function of what everybody advertised.

Every node computes the same plan from the same view, whatever the order in which the adverts came: integers
only, ties broken by peer id. The objective is max-min: make the worst covered layer as well covered as
possible (Petals, arXiv:2209.01188, `block_selection.py`), with three differences that keep a mesh calm and
complete: nodes keep the place they have unless that leaves a hole, nodes are placed in a canonical order
instead of the order of arrival, and when memory is so tight that greedy choices fail, an exact search over
the order of the nodes along the layers finds a cover whenever there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Final

from meshnode.model.fit import ModelFacts, Range

EXACT_NODES: Final = 16  # the exact search looks at the orders of this many nodes (the largest ones)
SEARCH_NODES: Final = 64  # above, the neighbourhood search costs more time than its last percent is worth
MAX_SWEEPS: Final = 50
SEARCH_STEPS_PER_NODE: Final = 125
SEARCH_FREED: Final = 6  # most nodes freed in one step, at least 3
SEARCH_MEMORY: Final = 100  # steps
SEARCH_WORK: Final = 8_000_000  # bound on steps * nodes freed * windows * layers: about a tenth of a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One peer as placement sees it."""

    peer: str
    memory_bytes: int  # for weights and KV; 0: takes no layers
    max_layers: int = 0  # 0: only memory limits it
    rate: int = 1_000_000  # thousandths of a layer per second
    span: Range | None = None  # what it serves now
    target: Range | None = None  # what it announced to move to, or is loading
    epoch: int = field(default=0, compare=False)  # number of the intent behind `target`; no part of a plan
    tentative: bool = False  # `target` is only announced: nothing is served and nothing loads yet
    draining: bool = False  # takes no new sessions and leaves

    @property
    def place(self) -> Range | None:
        """Where it is, or will soon be."""
        return self.target or self.span


@dataclass(frozen=True, slots=True)
class Plan:
    """A span for each node that gets one, and what stays uncovered."""

    spans: Mapping[str, Range]  # read only: plans are shared
    coverage: tuple[int, ...]  # per layer: thousandths of a token per second that its nodes can do together
    reshuffled: bool  # nobody's present place was taken into account

    @property
    def holes(self) -> tuple[Range, ...]:
        """Runs of layers that nobody holds."""
        return runs(layer for layer, rate in enumerate(self.coverage) if rate == 0)

    @property
    def bottleneck(self) -> int:
        return min(self.coverage)


def runs(layers: Iterable[int]) -> tuple[Range, ...]:
    """Sorted layer numbers as ranges [first, last)."""
    out: list[Range] = []
    for layer in layers:
        if out and out[-1][1] == layer:
            out[-1] = (out[-1][0], layer + 1)
        else:
            out.append((layer, layer + 1))
    return tuple(out)


def windows_of(facts: ModelFacts, memory_bytes: int, max_layers: int) -> tuple[Range, ...]:
    """The spans that fill a node: every range that fits lies inside one of them. By first layer."""
    out: list[Range] = []
    for first in range(facts.layers):
        last = facts.reach(first, memory_bytes, max_layers)
        if last > first and (not out or last > out[-1][1]):
            out.append((first, last))
    return tuple(out)


class _Board:
    """Nodes on layers, while a plan is being made."""

    def __init__(self, facts: ModelFacts, nodes: Sequence[Node]) -> None:
        self.facts = facts
        tables: dict[tuple[int, int], tuple[Range, ...]] = {}
        for node in nodes:
            limits = (node.memory_bytes, node.max_layers)
            if limits not in tables:
                tables[limits] = windows_of(facts, *limits)
        self.windows = {n.peer: tables[n.memory_bytes, n.max_layers] for n in nodes}
        widest = {peer: max((last - first for first, last in w), default=0) for peer, w in self.windows.items()}
        self.nodes = sorted(
            (n for n in nodes if widest[n.peer]), key=lambda n: (-widest[n.peer], -n.rate, n.peer)
        )  # canonical order: large before small, fast before slow
        self.rate = {n.peer: n.rate for n in nodes}
        self.spans: dict[str, Range] = {}
        self.coverage = [0] * facts.layers

    def share(self, peer: str, span: Range) -> int:
        """What the node adds to each layer of its span: tokens per second through all of it, in thousandths."""
        return max(1, self.rate[peer] * 1000 // self.facts.span_work(*span))

    def put(self, peer: str, span: Range) -> None:
        self.spans[peer] = span
        share = self.share(peer, span)
        for layer in range(*span):
            self.coverage[layer] += share

    def take(self, peer: str) -> Range:
        span = self.spans.pop(peer)
        share = self.share(peer, span)
        for layer in range(*span):
            self.coverage[layer] -= share
        return span

    def restore(self, spans: Mapping[str, Range]) -> None:
        """Put exactly these spans on the board."""
        self.spans = {}
        self.coverage = [0] * self.facts.layers
        for peer, span in spans.items():
            self.put(peer, span)

    def best_window(self, peer: str, must: Sequence[int] = ()) -> Range | None:
        """The window with the worst covered layers, the leftmost of equals. None if no window has all of `must`."""
        coverage, windows = self.coverage, self.windows[peer]
        if must:
            windows = tuple(w for w in windows if w[0] <= must[0] and must[-1] < w[1])
        return min(windows, key=lambda w: (sorted(coverage[w[0] : w[1]]), w[0]), default=None)

    def put_best(self, peer: str) -> Range:
        """Put a node where it is needed most."""
        window = self.best_window(peer)
        assert window is not None, "nodes without windows are not on the board"
        self.put(peer, window)
        return window

    def score(self) -> list[int]:
        """Coverage from the worst layer on; larger is better."""
        return sorted(self.coverage)

    def fill(self) -> None:
        """Give a place to every node that has none."""
        for node in self.nodes:
            if node.peer not in self.spans:
                self.put_best(node.peer)

    def close_holes(self, *, protect: bool) -> None:
        """While there is a hole: make the one move that helps most.

        protect: no move may uncover another layer, not even for a smaller hole.
        """
        for _ in self.nodes:
            if min(self.coverage):
                return
            before = self.score()
            best: tuple[list[int], str, Range] | None = None
            for node in self.nodes:
                old = self.take(node.peer)
                alone = [layer for layer in range(*old) if not self.coverage[layer]] if protect else []
                new = self.best_window(node.peer, alone)
                if new is not None:
                    self.put(node.peer, new)
                    score = self.score()
                    if score > before and (best is None or score > best[0]):
                        best = (score, node.peer, new)
                    self.take(node.peer)
                self.put(node.peer, old)
            if best is None:
                return
            self.take(best[1])
            self.put(best[1], best[2])

    def sweep(self) -> None:
        """Let every node in turn take a better place, until nobody wants to."""
        score = self.score()
        for _ in range(MAX_SWEEPS):
            moved = False
            for node in self.nodes:
                old = self.take(node.peer)
                new = self.put_best(node.peer)
                now = self.score() if new != old else score
                if now > score:
                    score, moved = now, True
                elif new != old:
                    self.take(node.peer)
                    self.put(node.peer, old)
            if not moved:
                return

    def search(self) -> None:
        """Large-neighbourhood search: free some nodes, place them again, keep what is better.

        Late acceptance (Burke and Bykov 2017): a step may also be worse than the present, if it is not worse
        than where the search was `SEARCH_MEMORY` steps ago. Draws come from a hash of the start, so every node
        walks the same way.
        """
        count = len(self.nodes)
        if not 3 <= count <= SEARCH_NODES:
            return
        most = min(SEARCH_FREED, count)
        widest = max(len(w) for w in self.windows.values())
        steps = min(SEARCH_STEPS_PER_NODE * count, SEARCH_WORK // (most * widest * self.facts.layers))
        seed = sha256(repr(sorted(self.spans.items())).encode()).digest()
        score = self.score()
        best, best_score = dict(self.spans), score
        earlier = [score] * SEARCH_MEMORY
        for step in range(steps):
            draw = sha256(seed + step.to_bytes(4, "big")).digest()
            draws = (int.from_bytes(draw[i : i + 4], "big") % count for i in range(4, 4 + 4 * most, 4))
            fewest = min(3, most)
            freed = list(dict.fromkeys(draws))[: fewest + draw[0] % (most - fewest + 1)]
            old = [(self.nodes[i].peer, self.take(self.nodes[i].peer)) for i in freed]
            for peer, _ in old:
                self.put_best(peer)
            now = self.score()
            if now >= score or now >= earlier[step % SEARCH_MEMORY]:
                score = now
                if score > best_score:
                    best, best_score = dict(self.spans), score
            else:
                for peer, _ in old:
                    self.take(peer)
                for peer, span in old:
                    self.put(peer, span)
            earlier[step % SEARCH_MEMORY] = score
        self.restore(best)

    def trim(self, keep: frozenset[str]) -> None:
        """Give up layers that two nodes of a chain both hold, so that their work is even.

        Only between nodes without which there is a hole anyway: such an overlap survives no failure and makes
        nothing faster, it only costs fetching and memory. Nodes in `keep` stay as they are.
        """
        holders: list[list[str]] = [[] for _ in self.coverage]
        for peer, span in self.spans.items():
            for layer in range(*span):
                holders[layer].append(peer)
        essential = {peers[0] for peers in holders if len(peers) == 1}
        floor = min(self.coverage)
        while True:
            choices: list[tuple[int, str, int]] = []
            for peer in essential - keep:
                first, last = self.spans[peer]
                share = self.share(peer, (first, last))
                for layer in (first, last - 1):
                    others = [p for p in holders[layer] if p != peer and p in essential]
                    if others and self.coverage[layer] - share >= floor:
                        load = self.facts.span_work(first, last) * 1_000_000 // max(1, self.rate[peer])
                        choices.append((-load, peer, layer))
            if not choices:
                return
            _, peer, layer = min(choices)
            first, last = self.take(peer)
            self.put(peer, (first + 1, last) if layer == first else (first, last - 1))
            holders[layer].remove(peer)

    def settle_equals(self, places: Mapping[str, Range]) -> None:
        """Let nodes with the same limits swap, where that keeps one of them at its present place."""
        for peer, place in sorted(places.items()):
            if peer not in self.spans or self.spans[peer] == place:
                continue
            for other, span in sorted(self.spans.items()):
                if span == place and places.get(other) != span and self.windows[other] == self.windows[peer]:
                    mine = self.take(peer)
                    self.take(other)
                    self.put(peer, span)
                    self.put(other, mine)
                    break


def cover(windows: Sequence[tuple[Range, ...]], layers: int) -> list[tuple[int, Range]] | None:
    """An exact contiguous cover of all layers by some of the nodes, or None when there is none.

    Dynamic programming over sets of nodes: the furthest layer that a set can reach from layer 0 is enough to
    know about it, because starting later never lets a node reach less far. Nodes with equal windows are
    interchangeable, so a set is a count of each kind.

    Args:
      windows: of each node, as `windows_of` gives them.

    Returns:
      (index of the node, its window) along the layers, of as few nodes as possible.
    """
    kinds: dict[tuple[Range, ...], list[int]] = {}
    for index, table in enumerate(windows):
        if table:
            kinds.setdefault(table, []).append(index)
    tables = list(kinds)
    furthest = [[max((w for w in table if w[0] <= at), key=lambda w: w[1], default=(0, 0))[1] for at in range(layers)]
                for table in tables]  # fmt: skip
    limit = [len(kinds[table]) for table in tables]
    start = (0,) * len(tables)
    level: dict[tuple[int, ...], int] = {start: 0}
    parents: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {}
    goal: tuple[int, ...] | None = None
    while level and goal is None:
        after: dict[tuple[int, ...], int] = {}
        for state, at in level.items():
            for kind, ends in enumerate(furthest):
                end = ends[at]
                if state[kind] == limit[kind] or end <= at:
                    continue
                new = (*state[:kind], state[kind] + 1, *state[kind + 1 :])
                if end > after.get(new, -1):
                    after[new] = end
                    parents[new] = (state, kind)
                    if end == layers:
                        goal = new
                        break
            if goal:
                break
        level = after
    if goal is None:
        return None
    order: list[int] = []
    while goal != start:
        goal, kind = parents[goal]
        order.append(kind)
    left = {kind: list(kinds[tables[kind]]) for kind in order}
    out, at = [], 0
    for kind in reversed(order):
        window = max((w for w in tables[kind] if w[0] <= at), key=lambda w: w[1])
        out.append((left[kind].pop(0), window))
        at = window[1]
    return out


def _reshuffle(board: _Board) -> bool:
    """Place everybody anew so that no hole is left. False when nothing covers the model."""
    widest = [max(last - first for first, last in board.windows[n.peer]) for n in board.nodes]
    if sum(widest) < board.facts.layers:
        return False
    board.restore({})
    board.fill()
    board.sweep()
    if min(board.coverage):
        return True
    largest = board.nodes[:EXACT_NODES]
    chain = cover([board.windows[n.peer] for n in largest], board.facts.layers)
    if chain is None:
        return False
    board.restore({largest[index].peer: window for index, window in chain})
    board.fill()
    board.sweep()
    return True


def plan(facts: ModelFacts, nodes: Iterable[Node], *, ideal: bool = False, reshuffle: bool = True) -> Plan:
    """Where every node should be.

    Args:
      ideal: improve beyond closing holes (for comparing with the present); else nodes that have a place keep
        it unless a hole forces one to move. Ideal from the start when nobody has a place yet.
      reshuffle: nothing is served as a whole, so a move may uncover other layers, and when single moves close
        no hole, everybody may get another place.
    """
    live = tuple(sorted((n for n in nodes if not n.draining), key=lambda n: n.peer))
    return _plan(facts, live, ideal, reshuffle)


@lru_cache(maxsize=32)  # the same view is looked at by several decisions
def _plan(facts: ModelFacts, live: tuple[Node, ...], ideal: bool, reshuffle: bool) -> Plan:
    board = _Board(facts, live)
    places = {n.peer: n.place for n in board.nodes if n.place is not None and n.place[1] <= facts.layers}
    board.restore(places)
    board.fill()
    board.close_holes(protect=not reshuffle)
    reshuffled = False
    if reshuffle and not min(board.coverage):
        kept = dict(board.spans)
        reshuffled = _reshuffle(board)
        if reshuffled:
            board.settle_equals(places)
        else:
            board.restore(kept)
    complete = min(board.coverage) > 0
    if complete and (ideal or not places):
        board.sweep()
        board.search()
    if not ideal:  # what improves a mesh that is at work must not be that some of its nodes hold less
        board.trim(frozenset(peer for peer, place in places.items() if board.spans.get(peer) == place))
    return Plan(dict(sorted(board.spans.items())), tuple(board.coverage), reshuffled)


def coverage_of(facts: ModelFacts, nodes: Iterable[Node], spans: Mapping[str, Range]) -> tuple[int, ...]:
    """Coverage per layer if the nodes held these spans; see `Plan.coverage`."""
    board = _Board(facts, sorted(nodes, key=lambda n: n.peer))
    board.restore({peer: span for peer, span in spans.items() if peer in board.rate})
    return tuple(board.coverage)
