"""How attacks on privacy are judged."""

from __future__ import annotations

import numpy as np
import pytest

from meshnode.bench.privacy import area


def test_the_area_is_the_chance_that_a_member_looks_more_like_one() -> None:
    assert area(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1.0
    assert area(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 0.0
    assert area(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0.5
    assert area(np.array([2.0, 2.0, 0.0]), np.array([1.0])) == pytest.approx(2 / 3)
