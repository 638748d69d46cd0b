"""What the engine process needs from a stage, whatever computes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np

from meshnode.model.adapter_file import Pair

Array = np.ndarray[Any, Any]


class Factors(Protocol):
    """What an adapter adds to one layer, as the stage that made it keeps it."""

    @property
    def nbytes(self) -> int: ...


class Rows(Protocol):
    """Keys and values of the first rows of a track that has ended, as the stage that made them keeps them."""


class Track(Protocol):
    """One session on a stage: its KV and what is bound to it."""

    def run(self, position: int, data: Array, *, prefill: bool, wanted: bool) -> Array:
        """Run the rows of `data` at `position` and the following ones.

        Args:
          data: int32 (rows,) token ids on the first layer, else float32 (rows, hidden).
          prefill: use the many-row kernels even for one row.
          wanted: after the last layer, whether the logits are needed.

        Returns:
          float32 (rows, hidden), also after the final norm; after the head float32 (vocab,) of the last row, or
          empty if not wanted.
          Valid until the next call.

        Raises:
          MemoryError: the process may not take what the step needs.
          ModelError: the layers can't be computed.
        """

    def keep(self, count: int) -> Rows:
        """The keys and values of the first rows. The track is over.

        Raises MemoryError: the process may not take what they need beside those of one layer.
        """

    def fill(self, rows: Rows, count: int, *, move: bool) -> None:
        """Have the first rows of another track over the same layers, as if they had been run here.

        `move`: they are given up there, layer by layer.
        """


class Stage(Protocol):
    """The span [first, last) of a model, ready to run."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the distinct group files."""

    def open(
        self, first: int, last: int, capacity: int, factors: Mapping[int, Factors] = ..., *, normed: bool = False
    ) -> Track:
        """A new session over the layers [first, last) of the span, with room for `capacity` positions.

        Args:
          factors: by layer, of the adapter that it runs with; they live as long as the track.
          normed: behind the last layer, only the final norm is run, and not the head.

        Raises:
          MemoryError: the process may not take what it needs.
          ModelError: the graph has no final norm of its own.
        """

    def adapt(self, first: int, last: int, targets: Collection[str]) -> None:
        """Have these linear layers of the layers [first, last) take factors from now on. Tracks go on as before.

        Raises:
          Declined: `bad-adapter` (the graph has no such linear layer there, or can't be opened so) or `busy` (no
            memory); the stage is as it was.
        """

    def factors(self, layer: int, pairs: Mapping[str, Pair], scale: float) -> Factors:
        """What `adapt` was called for, made ready for tracks.

        Raises Declined `bad-adapter`: not the sizes of the linear layers.
        """
