"""What the engine process needs from a stage, whatever computes it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


class Track(Protocol):
    """One session on a stage: its KV and what is bound to it."""

    def run(self, position: int, data: Array, *, prefill: bool, wanted: bool) -> Array:
        """Run the rows of `data` at `position` and the following ones.

        Args:
          data: int32 (rows,) token ids on the first layer, else float32 (rows, hidden).
          prefill: use the many-row kernels even for one row.
          wanted: after the last layer, whether the logits are needed.

        Returns:
          float32 (rows, hidden); after the last layer float32 (vocab,) of the last row, or empty if not wanted.
          Valid until the next call.
        """


class Stage(Protocol):
    """The span [first, last) of a model, ready to run."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the distinct group files."""

    def open(self, first: int, last: int, capacity: int) -> Track:
        """A new session over the layers [first, last) of the span, with room for `capacity` positions."""
