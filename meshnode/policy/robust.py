"""What hostile peers can't do with the adapters they send: limits on how far anybody moves anybody.

In this order, the cheap things first: `cap_of` refuses what is much further away than adapters usually are, the gate
(`gate.py`) what is worse on the shared suite, and `clipped_sum` bounds what the rest can do together.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from statistics import median
from typing import Final

import numpy as np

from meshnode.policy.mixing import Theirs
from protocols.delta.frame import Vector

CAP: Final = 3.0  # times the usual distance
REMEMBERED: Final = 64  # accepted distances
ENOUGH: Final = 4  # distances that say what is usual
HOSTILE_SHARE: Final = 4  # one neighbour in so many may be hostile, not counting the first


def distance(one: Vector, other: Vector) -> float:
    """Euclidean."""
    return float(np.linalg.norm(one.astype(np.float64) - other))


def cap_of(accepted: Sequence[float], present: Sequence[float]) -> float:
    """The largest distance between two adapters that is still plausible.

    Args:
      accepted: earlier distances to adapters that were used, oldest first.
      present: the distances of this exchange: what is usual as long as too few were accepted. One or two of them
        say nothing, then everything is plausible.
    """
    if len(accepted) >= ENOUGH:
        return CAP * median(accepted[-REMEMBERED:])
    return CAP * median(present) if len(present) > 2 else inf


def hostile_weight(theirs: Sequence[Theirs]) -> float:
    """The weight that hostile neighbours may have: one in four of those after the first, the heaviest ones."""
    count = max(0, len(theirs) - 1) // HOSTILE_SHARE
    return sum(sorted((other.weight for other in theirs), reverse=True)[:count])


def clip_radius(distances: Sequence[float], weights: Sequence[float], hostile: float) -> float:
    """CS+: the largest distance whose cumulative weight, ascending and with ourselves at 0, stays within all that is
    not twice the hostile weight. 0: there may be too many hostile ones to listen to anybody.

    Gaucher, Dieuleveut, Hendrikx: "Unified Breakdown Analysis for Byzantine Robust Gossip" (ICML 2025).

    Args:
      weights: of the neighbours; ours is what is left of 1.
    """
    if not hostile:
        return inf
    most = 1.0 - 2.0 * hostile + 1e-9  # weights are sums of fractions
    cumulative, radius = 1.0 - sum(weights), 0.0
    if cumulative > most:
        return 0.0
    for far, weight in sorted(zip(distances, weights, strict=True)):
        cumulative += weight
        if cumulative > most:
            break
        radius = far
    return radius


def clipped_sum(own: Vector, sent: Vector, theirs: Sequence[Theirs], hostile: float) -> Vector:
    """own + sum of weight * clip(theirs - sent, radius): nobody moves us further than honest neighbours might."""
    distances = [distance(other.vector, sent) for other in theirs]
    radius = clip_radius(distances, [other.weight for other in theirs], hostile)
    mixed = own.astype(np.float64)
    for other, far in zip(theirs, distances, strict=True):
        part = 1.0 if far <= radius else radius / far
        mixed += other.weight * part * (other.vector.astype(np.float64) - sent)
    return mixed.astype(np.float32)
