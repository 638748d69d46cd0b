"""How fast a plan will answer, in words: "alone 41 tok/s, over three nodes 24"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from meshnode.model.facts import ModelFacts, Range

HOP_US: Final = 800  # a hop costs at least this: serialising, the pipes to the engine, the wire on loopback
_WORDS: Final = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True, slots=True)
class Prediction:
    """Speed of one stream. Thousandths of tokens per second; 0 means that the plan has a hole."""

    mesh_milli: int
    stages: tuple[tuple[str, Range], ...]  # the fastest chain: (peer, layers)
    alone_milli: int  # the fastest single node, if it held the whole model
    alone_fits: bool  # whether that node has the memory for it

    @property
    def text(self) -> str:
        """One line for people."""
        alone, mesh = _tokens(self.alone_milli), _tokens(self.mesh_milli)
        count = len({peer for peer, _ in self.stages})
        if not self.mesh_milli:
            return "no answer: layers are missing"
        if count == 1:
            return f"about {mesh} tok/s on one node"
        nodes = _WORDS[count] if count < len(_WORDS) else str(count)
        if self.alone_fits:
            return f"alone {alone} tok/s, over {nodes} nodes {mesh}"
        return f"over {nodes} nodes about {mesh} tok/s (alone {alone}, but no node has the memory)"


def _tokens(milli: int) -> str:
    return f"{milli / 1000:.1f}" if milli < 10_000 else str(round(milli / 1000))


def predict(
    facts: ModelFacts,
    spans: Mapping[str, Range],
    layer_us: Mapping[str, int],
    memory_bytes: Mapping[str, int],
    *,
    hop_us: Mapping[tuple[str, str], int] | None = None,
) -> Prediction:
    """The fastest chain through the spans for one stream, and the fastest node alone.

    Args:
      layer_us: microseconds of a one-row step through an average layer, per peer.
      memory_bytes: per peer, to say whether the fastest node alone has room.
      hop_us: one-way microseconds between two peers where known; `HOP_US` elsewhere.
    """
    whole = facts.span_work(0, facts.layers)
    # The cost of the last hop back to the asking node is the same for every chain and counted once.
    best: dict[int, dict[str, tuple[int, tuple[tuple[str, Range], ...]]]] = {0: {"": (HOP_US, ())}}
    cuts = sorted({0, *(layer for span in spans.values() for layer in span)})  # changing over elsewhere gains nothing
    for at in cuts[:-1]:
        for before, (cost, chain) in sorted(best.get(at, {}).items()):
            for peer, (first, last) in sorted(spans.items()):
                if not first <= at < last or any(peer == earlier for earlier, _ in chain):
                    continue
                hop = 0 if not before else max(HOP_US, (hop_us or {}).get((before, peer), 0))
                for end in (cut for cut in cuts if at < cut <= last):
                    total = cost + hop + facts.span_work(at, end) * layer_us[peer] // 1000
                    ends = best.setdefault(end, {})
                    if peer not in ends or total < ends[peer][0]:
                        ends[peer] = (total, (*chain, (peer, (at, end))))
    done = min(best.get(facts.layers, {}).values(), default=None)
    fastest = _fastest(sorted(layer_us), layer_us, memory_bytes)
    alone_us = HOP_US + whole * layer_us[fastest] // 1000 if fastest else 0
    return Prediction(
        mesh_milli=1_000_000_000 // max(1, done[0]) if done else 0,
        stages=done[1] if done else (),
        alone_milli=1_000_000_000 // max(1, alone_us) if fastest else 0,
        alone_fits=bool(fastest) and memory_bytes.get(fastest, 0) >= facts.need(0, facts.layers),
    )


def _fastest(peers: Sequence[str], layer_us: Mapping[str, int], memory_bytes: Mapping[str, int]) -> str:
    serving = [peer for peer in peers if memory_bytes.get(peer, 0)]
    return min(serving, key=lambda peer: (layer_us[peer], -memory_bytes[peer], peer), default="")
