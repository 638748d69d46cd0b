"""The cheapest chain of peers through all layers: Dijkstra over the layers where one span begins or ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from meshnode.model.fit import Range

START: Final = ""  # stands for the asker before the first stage


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a chain: who runs which layers."""

    peer: str
    layers: Range


@dataclass(frozen=True, slots=True)
class Chain:
    cost: int  # microseconds
    stages: tuple[Stage, ...]


def cheapest(
    spans: Mapping[str, Range],
    layers: int,
    *,
    hop_us: Callable[[str, str], int],
    run_us: Callable[[str, Range], int],
    back_us: Callable[[str], int] = lambda _peer: 0,
    candidates: Callable[[int, Sequence[str]], Sequence[str]] = lambda _at, peers: peers,
) -> Chain | None:
    """The cheapest way through [0, layers), or None when a layer has no peer.

    A peer runs one range of layers per chain: from where the one before it ends, to the end of its span or to any
    layer where another span begins or ends. Of equal costs the shorter chain wins, then the one that was found first.

    Args:
      hop_us: from one peer (`START` for the asker) to the next.
      run_us: of a peer that runs these layers.
      back_us: from the last peer to the asker.
      candidates: which of the peers that serve the layer at a boundary are looked at, in which order.
    """
    cuts = sorted({0, layers, *(end for span in spans.values() for end in span)})
    # At each boundary the best way to it for every peer that may be the last one: (cost, stages).
    best: dict[int, dict[str, Chain]] = {0: {START: Chain(0, ())}}
    for at in cuts[:-1]:
        if at not in best:
            continue
        looked_at = candidates(at, [peer for peer, (first, last) in spans.items() if first <= at < last])
        for before, chain in best[at].items():
            for peer in looked_at:
                if any(peer == stage.peer for stage in chain.stages):
                    continue
                start = chain.cost + hop_us(before, peer)
                for end in (cut for cut in cuts if at < cut <= spans[peer][1]):
                    cost = start + run_us(peer, (at, end)) + (back_us(peer) if end == layers else 0)
                    known = best.setdefault(end, {}).get(peer)
                    if known is None or (cost, len(chain.stages) + 1) < (known.cost, len(known.stages)):
                        best[end][peer] = Chain(cost, (*chain.stages, Stage(peer, (at, end))))
    return min(best.get(layers, {}).values(), key=lambda done: (done.cost, len(done.stages)), default=None)
