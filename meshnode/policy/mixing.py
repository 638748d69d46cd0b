"""How adapters come together: the arithmetic of the modes, on vectors. Algorithms: protocols/round/SPEC.md.

All vectors are float32 of one dimension; results are new ones. Each side of an exchange adds differences between what
was *sent*, also for its own adapter: so what one side gains the other loses, exactly, and quantisation moves no mean
(Koloskova et al., "Decentralized Stochastic Optimization and Gossip Algorithms with Compressed Communication", ICML
2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from protocols.delta.frame import Vector

OUTER_RATE: Final = 0.7  # of NoLoCo and DiLoCo
OUTER_DECAY: Final = 0.3  # of the momentum: that of NoLoCo for few inner steps
ELASTICITY: Final = 0.5  # part of the way that the elastic mode goes


@dataclass(frozen=True, slots=True)
class Theirs:
    """A partner's adapter, as it was sent."""

    vector: Vector
    weight: float  # of the exchange, less for stale ones


def staleness_weight(rounds: int) -> float:
    """What a delta that is so many rounds old counts for (polynomial staleness, FedAsync, arXiv 1903.03934)."""
    return float((1 + rounds) ** -0.5)


def averaged(own: Vector, sent: Vector, theirs: Sequence[Theirs]) -> Vector:
    """own + sum of weight * (theirs - sent). With the weights of a schedule's cycle, all end with the mean.

    Args:
      sent: our adapter as the others have read it.
    """
    mixed = own.astype(np.float64)
    for other in theirs:
        mixed += other.weight * (other.vector.astype(np.float64) - sent)
    return mixed.astype(np.float32)


def elastic(own: Vector, sent: Vector, theirs: Sequence[Theirs]) -> Vector:
    """Goes part of the way only, so that each keeps what its own data taught (Elastic Gossip, arXiv 1812.02407)."""
    return averaged(own, sent, [Theirs(other.vector, ELASTICITY * other.weight) for other in theirs])


@dataclass(frozen=True, slots=True)
class Outer:
    """The slow side of NoLoCo (arXiv 2506.10911): what the inner steps of a round start from."""

    slow: Vector
    momentum: Vector

    @classmethod
    def start(cls, slow: Vector) -> Outer:
        return cls(slow, np.zeros_like(slow))


def outer_step(outer: Outer, mean: Vector) -> Outer:
    """Momentum towards the pair's mean: m <- decay m + rate (mean - slow); slow <- slow + m.

    Args:
      mean: `averaged` of the fast adapters after the inner steps. NoLoCo's two terms, the mean pseudo-gradient of
        the pair and the difference of its slow weights, have this one as their sum.
    """
    momentum = np.float32(OUTER_DECAY) * outer.momentum + np.float32(OUTER_RATE) * (mean - outer.slow)
    return Outer(outer.slow + momentum, momentum)


def added(reference: Vector, changes: Iterable[Vector]) -> Vector:
    """The adapter after these changes, each already divided by the number of participants that its sender saw. The
    same for every order of them, up to rounding."""
    total = reference.astype(np.float64)
    for change in changes:
        total += change
    return total.astype(np.float32)


def adopted(vectors: Sequence[Vector]) -> Vector:
    """What a newcomer begins with: the median of each value, so that a minority decides nothing."""
    return np.median(np.stack(vectors), axis=0).astype(np.float32)
