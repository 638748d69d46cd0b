"""How fast a plan will answer, in words: "alone 41 tok/s, over three nodes 24"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from meshnode.model.fit import ModelFacts, Range
from meshnode.policy.chain import cheapest
from meshnode.policy.mesh_view import UNMEASURED_LAYER_US
from meshnode.policy.placement import Node
from protocols.ids import PeerId

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


def predict_mesh(facts: ModelFacts, nodes: Sequence[Node], layer_us: Mapping[PeerId, int]) -> Prediction:
    """The same for nodes as placement sees them, at the places where they are or will be."""
    return predict(
        facts,
        {node.peer: node.place for node in nodes if node.place is not None},
        {node.peer: layer_us.get(PeerId(node.peer), UNMEASURED_LAYER_US) for node in nodes},
        {node.peer: node.memory_bytes for node in nodes},
    )


def predict(
    facts: ModelFacts,
    spans: Mapping[str, Range],
    layer_us: Mapping[str, int],
    memory_bytes: Mapping[str, int],
) -> Prediction:
    """The fastest chain through the spans for one stream, and the fastest node alone.

    Args:
      layer_us: microseconds of a one-row step through an average layer, per peer.
      memory_bytes: per peer, to say whether the fastest node alone has room.
    """
    whole = facts.span_work(0, facts.layers)
    chain = cheapest(
        dict(sorted(spans.items())),
        facts.layers,
        # The first hop counts like the others; the way back costs every chain the same and counts nothing.
        hop_us=lambda _before, _peer: HOP_US,
        run_us=lambda peer, layers: facts.span_work(*layers) * layer_us[peer] // 1000,
    )
    fastest = _fastest(sorted(layer_us), layer_us, memory_bytes)
    alone_us = HOP_US + whole * layer_us[fastest] // 1000 if fastest else 0
    return Prediction(
        mesh_milli=1_000_000_000 // max(1, chain.cost) if chain else 0,
        stages=tuple((stage.peer, stage.layers) for stage in chain.stages) if chain else (),
        alone_milli=1_000_000_000 // max(1, alone_us) if fastest else 0,
        alone_fits=bool(fastest) and memory_bytes.get(fastest, 0) >= facts.need(0, facts.layers),
    )


def _fastest(peers: Sequence[str], layer_us: Mapping[str, int], memory_bytes: Mapping[str, int]) -> str:
    serving = [peer for peer in peers if memory_bytes.get(peer, 0)]
    return min(serving, key=lambda peer: (layer_us[peer], -memory_bytes[peer], peer), default="")
