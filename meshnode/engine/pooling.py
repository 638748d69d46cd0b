"""One vector out of the hidden states of a text: the mean over its tokens, of length 1."""

from __future__ import annotations

from typing import Any

import numpy as np

from meshnode.core.errors import Declined
from meshnode.engine.backend import Array
from protocols.enginewire.messages import BAD_INPUT, FENCED

Floats = np.ndarray[Any, np.dtype[np.float64]]


class Pool:
    """The sum of rows, in float64 and one after the other: it is the same however a text is cut into steps."""

    def __init__(self, hidden: int) -> None:
        self._sum: Floats = np.zeros(hidden, np.float64)
        self._rows = 0

    def add(self, position: int, rows: Array) -> None:
        """Take float32 (rows, hidden) at `position`; at 0 it begins anew.

        Raises Declined `fenced` for rows that do not follow: what was added can't be taken off.
        """
        if position == 0:
            self._sum[:] = 0
            self._rows = 0
        if position != self._rows:
            raise Declined(
                FENCED, f"Rows at position {position} were to be added to the mean of {self._rows} rows. Ask again."
            )
        for row in rows:
            self._sum += row
        self._rows += len(rows)

    def mean(self) -> Array:
        """float32 (hidden,), of Euclidean length 1. Raises Declined `bad-input` where there is none."""
        length = float(np.sqrt(np.square(self._sum).sum()))
        if not np.isfinite(length) or length == 0.0:
            raise Declined(
                BAD_INPUT, "The last layer gave hidden states without a direction: what came in was wrong."
            )
        return (self._sum / length).astype(np.float32)
