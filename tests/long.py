"""What `make test-long` runs and `make test` leaves out: cases of a kind of which some run every time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest

LONG = "MESHNODE_TEST_LONG" in os.environ


def some(every: Iterable[Any], *always: Any) -> list[Any]:
    """Parameters of which those named run always, the others by `make test-long`. Raises ValueError."""
    cases = list(every)
    unknown = [case for case in always if case not in cases]
    if unknown:
        raise ValueError(f"{unknown} are none of {cases}.")
    return [case if case in always else pytest.param(case, marks=pytest.mark.long) for case in cases]
