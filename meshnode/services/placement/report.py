"""What placement says to people: how fast the mesh will be, which layers are missing, what keeps us from helping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from meshnode.core.health import Health
from meshnode.core.sizes import format_size
from meshnode.model.release import ServedRelease
from meshnode.policy.mesh_view import layer_us_of
from meshnode.policy.moves import wanted_plan
from meshnode.policy.placement import Node, runs
from meshnode.policy.prediction import Prediction, predict_mesh
from protocols.advert.messages import MAX_TROUBLE, Advert
from protocols.ids import PeerId
from protocols.words import layers

TROUBLES: Final = frozenset(
    {"does-not-fit", "model-unusable", "span-failed", "engine-restarting", "quota-exceeded", "disk-low"}
)


class PlacementReport:
    """Kept up to date whenever the mesh has changed."""

    def __init__(self, health: Health) -> None:
        self.prediction: Prediction | None = None
        self._health = health

    def assess(
        self, release: ServedRelease, nodes: tuple[Node, ...], live: Mapping[PeerId, Advert], memory: int
    ) -> None:
        """Work out prediction and health anew. `memory`: bytes that this node gives."""
        facts, model = release.facts, release.title
        self.prediction = predict_mesh(facts, nodes, layer_us_of(live))
        holes = wanted_plan(facts, nodes).holes if nodes else runs(range(facts.layers))
        if holes:
            missing = sum(facts.need(*hole) for hole in holes)
            words, needed = layers(*holes[0]), format_size(missing)
            self._health.set("not-covered", layers=words, model=model, missing=needed)
        else:
            self._health.clear("not-covered")
        least = min(facts.need(layer, layer + 1) for layer in range(facts.layers))
        if memory and memory < least:
            self._health.set("does-not-fit", model=model, memory=format_size(memory), needed=format_size(least))
        else:
            self._health.clear("does-not-fit")

    def trouble(self) -> str:
        """What keeps this node from serving as it should: others show it to whoever waits for its layers."""
        words = next((shown.text for shown in self._health.current() if shown.code in TROUBLES), "")
        return words if len(words) <= MAX_TROUBLE else f"{words[: MAX_TROUBLE - 1]}…"
