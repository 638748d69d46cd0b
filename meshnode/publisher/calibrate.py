"""Which inputs of a matrix matter: the mean square of each over a short mixed text, in the checkpoint's own model.

It says where a rounding error does harm. Runs in the publisher only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from meshnode.publisher.expression import Array
from meshnode.publisher.heads import Widening

_STEPS: Final = 2.0  # importance is rounded to powers of 2 ** (1 / 2): tiny differences of a CPU don't change a CID
_FUSED: Final = {  # matrices that some checkpoints store together with others of the same input
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


class Importance:
    """Importance of the input columns of each matrix: float32 [K], mean around 1."""

    def __init__(self, found: Mapping[str, Array]) -> None:
        self._found = found

    def of(self, sources: list[str]) -> Array | None:
        """By the names of the checkpoint weights that a matrix is made of; None: not known."""
        for name in sources:
            parts = name.split(".")
            fused = ".".join([*parts[:-2], _FUSED.get(parts[-2], parts[-2]), parts[-1]]) if len(parts) > 1 else name
            for known in (name, fused):
                if known in self._found:
                    return self._found[known]
        return None

    def of_wide_heads(self, wide: Widening | None) -> Importance:
        """The same for heads that were made wider: the new columns of the output matrices matter not at all."""
        if wide is None:
            return self
        places = np.array(wide.places)
        out = dict(self._found)
        for name, values in self._found.items():
            if name.endswith(".o_proj.weight") and len(values) % wide.width == 0:
                heads = values.reshape(-1, wide.width)
                out[name] = np.where(places >= 0, heads[:, np.maximum(places, 0)], 0).reshape(-1).astype(np.float32)
        return Importance(out)


UNKNOWN: Final = Importance({})  # every input counts the same


class ImportanceMeter:
    """Looks at what every matrix of a running model is multiplied with."""

    def __init__(self, row: int, rows: int) -> None:
        """`row`: which of the texts that run together; `rows`: its tokens that count."""
        self._row = row
        self._rows = rows
        self._found: dict[str, Array] = {}

    def look(self, name: str, inputs: Array) -> None:
        """The input [texts, tokens, columns] of the matrix of this name."""
        if self._rows and inputs.ndim == 3 and inputs.shape[0] > self._row:
            self._found[name] = _rounded(np.square(inputs[self._row, : self._rows]).mean(axis=0))

    def importance(self, *, tied: bool) -> Importance:
        """`tied`: the embedding is the head's matrix, so it counts what matters there."""
        if tied and "lm_head.weight" in self._found:
            self._found["model.embed_tokens.weight"] = self._found["lm_head.weight"]
        return Importance(self._found)


def _rounded(squares: Array) -> Array:
    relative = np.asarray(squares, np.float64) / max(float(squares.mean()), 1e-30)
    steps = np.rint(np.log2(np.clip(relative, 2.0**-12, 2.0**12)) * _STEPS)
    return np.exp2(steps / _STEPS).astype(np.float32)
