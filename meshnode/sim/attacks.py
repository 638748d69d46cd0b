"""What hostile learners send. They collude, and know every honest adapter at every moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from meshnode.policy.robust import CAP
from protocols.delta.frame import Vector

Wide = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scene:
    """What an attacker sees when somebody fetches its delta."""

    before: Vector  # its own adapter before this round's training
    trained: Vector  # and after it
    honest_before: Sequence[Vector]
    honest: Sequence[Vector]
    victim: Vector  # the adapter of who fetches
    hostile: int  # attackers


Attack = Callable[[Scene], Vector]


def _mean(vectors: Sequence[Vector]) -> Wide:
    mean: Wide = np.mean(np.stack(vectors), axis=0, dtype=np.float64)
    return mean


def _narrow(vector: Wide) -> Vector:
    return np.asarray(vector, np.float32)


def sign_flip(scene: Scene) -> Vector:
    """Five times its own change, backwards."""
    before = scene.before.astype(np.float64)
    return _narrow(before - 5 * (scene.trained - before))


def alie(scene: Scene) -> Vector:
    """A little is enough (Baruch et al., NeurIPS 2019): as far from the mean as honest ones might be."""
    spread: Wide = np.std(np.stack(scene.honest), axis=0, dtype=np.float64)
    return _narrow(_mean(scene.honest) - 1.5 * spread)


def ipm(scene: Scene) -> Vector:
    """Inner product manipulation (Xie et al., UAI 2019): against the mean of the honest changes."""
    before = _mean(scene.honest_before)
    return _narrow(before - 0.5 * (_mean(scene.honest) - before))


def dissensus(scene: Scene) -> Vector:
    """Pushes each victim away from the others (He et al., 2022); every victim gets another vector."""
    pull = len(scene.honest) * (_mean(scene.honest) - scene.victim)
    return _narrow(scene.victim - 1.5 * pull / scene.hostile)


def bounded(scene: Scene) -> Vector:
    """What its data taught, stretched to just below what a limit on the distance lets pass."""
    pairs = zip(scene.honest_before, scene.honest, strict=True)
    usual = float(np.median([np.linalg.norm(after - before) for before, after in pairs]))
    change = scene.trained - scene.before
    most = 0.95 * CAP * usual
    stretch = min(5.0, most / max(float(np.linalg.norm(change)), 1e-12))
    return _narrow(scene.before.astype(np.float64) + stretch * change)


@dataclass(frozen=True, slots=True)
class Plan:
    """How hostile nodes train and what they send."""

    poison: str = ""  # of their data, see Toy.worker
    attack: Attack | None = None  # none: they send what they trained


PLANS: Final[Mapping[str, Plan]] = {
    "sign flip": Plan(attack=sign_flip),
    "label flip": Plan(poison="labels"),
    "alie": Plan(attack=alie),
    "ipm": Plan(attack=ipm),
    "dissensus": Plan(attack=dissensus),
    "backdoor": Plan(poison="backdoor", attack=bounded),
}
