"""Constant arithmetic on weights, carried out when a group file is written.

A graph builder packs Q, K and V into one matrix and transposes matrices with operators of the graph. Those
operators are taken out of the graph and kept here as expressions over the checkpoint's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Reader = Callable[[str], Array]  # name of a weight in the architecture -> float32 array


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]

    def sources(self) -> list[str]:
        return [self.name]

    def evaluate(self, weights: Reader) -> Array:
        return weights(self.name)


@dataclass(frozen=True, slots=True)
class Joined:
    """Concatenation along one axis."""

    axis: int
    parts: tuple[Expression, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        out = list(self.parts[0].shape)
        out[self.axis] = sum(p.shape[self.axis] for p in self.parts)
        return tuple(out)

    def sources(self) -> list[str]:
        return [name for part in self.parts for name in part.sources()]

    def evaluate(self, weights: Reader) -> Array:
        return np.concatenate([p.evaluate(weights) for p in self.parts], axis=self.axis)


@dataclass(frozen=True, slots=True)
class Transposed:
    """A matrix with its two axes swapped."""

    inner: Expression

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape[::-1]

    def sources(self) -> list[str]:
        return self.inner.sources()

    def evaluate(self, weights: Reader) -> Array:
        return self.inner.evaluate(weights).T


Expression = Weight | Joined | Transposed


def joint_name(expression: Expression) -> str:
    """A name for the result: `a.q_proj.weight`, `a.k_proj.weight`, `a.v_proj.weight` -> `a.qkv_proj.weight`."""
    names = expression.sources()
    if len(names) == 1:
        return names[0]
    parts = [n.split(".") for n in names]
    if len({len(p) for p in parts}) != 1:
        return "+".join(names)
    varying = [at for at, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    if len(varying) != 1:
        return "+".join(names)
    at = varying[0]
    words = [p[at] for p in parts]
    tail = "_proj" if all(w.endswith("_proj") for w in words) else ""
    stems = [w.removesuffix(tail) if tail else w for w in words]
    joined = "".join(stems) if all(len(s) == 1 for s in stems) else "_".join(stems)
    return ".".join([*parts[0][:at], joined + tail, *parts[0][at + 1 :]])
