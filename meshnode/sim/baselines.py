"""Rules of others, to compare ours with: each makes one vector of ours (first) and those of our neighbours.

`hostile`: how many of the neighbours may be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from protocols.delta.frame import Vector

Matrix = npt.NDArray[np.float64]  # (vectors, parameters)
Row = npt.NDArray[np.float64]
Rule = Callable[[Matrix, int], Row]


def mean(vectors: Matrix, hostile: int) -> Row:
    """The plain one."""
    out: Row = vectors.mean(axis=0)
    return out


def trimmed_mean(vectors: Matrix, hostile: int) -> Row:
    """Without the `hostile` smallest and largest values of each coordinate (Yin et al., ICML 2018)."""
    kept = np.sort(vectors, axis=0)[hostile : len(vectors) - hostile]
    out: Row = kept.mean(axis=0)
    return out


def krum(vectors: Matrix, hostile: int) -> Row:
    """The vector whose n - f - 2 nearest others are closest (Blanchard et al., NeurIPS 2017)."""
    gaps = ((vectors[:, None] - vectors[None]) ** 2).sum(axis=2)
    nearest = max(1, len(vectors) - hostile - 2)
    scores = np.sort(gaps, axis=1)[:, 1 : nearest + 1].sum(axis=1)  # the first is the vector itself
    out: Row = vectors[int(scores.argmin())]
    return out


def geometric_median(vectors: Matrix, hostile: int, steps: int = 100) -> Row:
    """The point with the least sum of distances, by Weiszfeld's iteration (RFA, Pillutla et al., 2022)."""
    point: Row = vectors.mean(axis=0)
    for _ in range(steps):
        far = np.maximum(np.linalg.norm(vectors - point, axis=1), 1e-9)
        after: Row = (vectors / far[:, None]).sum(axis=0) / (1 / far).sum()
        if np.linalg.norm(after - point) < 1e-10 * (1 + np.linalg.norm(point)):
            return after
        point = after
    return point


def clipped_gossip(vectors: Matrix, hostile: int) -> Row:
    """Differences clipped to the distance of the farthest neighbour that may be honest (He et al., 2022)."""
    changes = vectors[1:] - vectors[0]
    far = np.maximum(np.linalg.norm(changes, axis=1), 1e-12)
    radius = np.sort(far)[max(0, len(far) - hostile - 1)]
    out: Row = vectors[0] + (changes * np.minimum(1, radius / far)[:, None]).sum(axis=0) / len(vectors)
    return out


def nearest(vectors: Matrix, hostile: int) -> Row:
    """Without the `hostile` that are farthest from us (Farhadkhani et al., ICML 2023)."""
    far = np.linalg.norm(vectors - vectors[0], axis=1)
    out: Row = vectors[np.argsort(far, kind="stable")[: len(vectors) - hostile]].mean(axis=0)
    return out


RULES: Final[Mapping[str, Rule]] = {
    "mean": mean,
    "trimmed mean": trimmed_mean,
    "krum": krum,
    "geometric median": geometric_median,
    "clipped gossip": clipped_gossip,
    "nearest neighbours": nearest,
}


def apply(name: str, own: Vector, others: Sequence[Vector], hostile: int) -> Vector:
    """A rule by its name."""
    return RULES[name](np.stack([own, *others]).astype(np.float64), hostile).astype(np.float32)
