"""Mapped weights: what is copied, what is not, and what a bad file gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from meshnode.core.errors import ModelError
from meshnode.engine.cut import View
from meshnode.engine.weights import COPIED_BYTES, Weights


def view(dtype: str, shape: tuple[int, ...], offset: int) -> View:
    length = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return View(group="layer.0", dtype=np.dtype(dtype), shape=shape, offset=offset, length=length)


def test_small_tensors_are_copies_and_large_ones_the_file_itself(tmp_path: Path) -> None:
    """A step that reads a norm out of the file would make a whole run of its pages resident."""
    values = np.arange(COPIED_BYTES, dtype="<f4")
    (tmp_path / "layer").write_bytes(values.tobytes())
    weights = Weights({"layer.0": tmp_path / "layer"})
    small = weights.array("norm", view("<f4", (COPIED_BYTES // 4,), 0))
    large = weights.array("matrix", view("<f4", (2, COPIED_BYTES // 4), 64))
    np.testing.assert_array_equal(small, values[: COPIED_BYTES // 4])
    np.testing.assert_array_equal(large.ravel(), values[16:][: COPIED_BYTES // 2])
    whole = np.frombuffer(weights._maps[tmp_path / "layer"], np.uint8)
    assert not np.shares_memory(small, whole)
    assert np.shares_memory(large, whole)
    weights.release()
    np.testing.assert_array_equal(large.ravel(), values[16:][: COPIED_BYTES // 2])  # it comes back when touched


def test_bad_files_are_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"The weights layer\.0 at .*missing can't be read"):
        Weights({"layer.0": tmp_path / "missing"})
    (tmp_path / "layer").write_bytes(bytes(100))
    weights = Weights({"layer.0": tmp_path / "layer"})
    with pytest.raises(ModelError, match="cut off: norm ends at byte 104, the file at 100"):
        weights.array("norm", view("<f4", (10,), 64))
    other = View(group="layer.1", dtype=np.dtype("<f4"), shape=(1,), offset=0, length=4)
    with pytest.raises(ModelError, match=r"layer\.1, which this span was not given"):
        weights.array("norm", other)
