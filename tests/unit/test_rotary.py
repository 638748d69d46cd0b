"""Rotary tables: as exact as float32 can be, the same bytes everywhere, and no trust in a placeholder."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
import pytest

from meshnode.core.errors import ModelError
from meshnode.engine.backend import Array
from meshnode.engine.rotary import LOCATION, MAX_TABLE_BYTES, Function, Rotary, is_placeholder, parse

# float32 little endian, as transformers has them for SmolLM2 (theta 100000, 64 columns a head)
SMOLLM2 = np.frombuffer(
    bytes.fromhex(
        "0000803f06a5323fcf53f93efffcad3e23d4723e0974293ed67fec3d5609a53dc255663d1dbc203dd254e03c978b9c3c"
        "f27b5a3c0577183c15cad43bae7d943b383e4f3bdb9e103b5cd7c93adbd98c3a8c94443a022e093ad774bf39a99a8539"
        "53773a392b1f02391b9bb538d4757d3852df303896daf6371d43ac376d6b7037"
    ),
    "<f4",
)
DIGESTS: dict[Function, str] = {
    "cos": "4c48301763a20555243848c4f68fb183b8d13bc4812e98f048186864902e63ea",
    "sin": "f3e7e189c5de5ff0b6f1025b8ed8854bbf7d339ef95b44eaad22cbf92247de0f",
}
WAVES = {"cos": np.cos, "sin": np.sin}


def apart(one: Array, other: Array) -> int:
    """The largest distance of two float32 arrays in units of the last place."""
    ordered = [
        np.where(a < 0, -(a & 0x7FFFFFFF), a) for a in (x.view(np.int32).astype(np.int64) for x in (one, other))
    ]
    return int(np.abs(ordered[0] - ordered[1]).max())


def expected(function: Function, frequencies: Array, positions: int) -> Array:
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    return np.asarray(WAVES[function](angles.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize("function", ["cos", "sin"])
def test_a_table_has_the_same_bytes_everywhere(function: Function) -> None:
    table = Rotary(function, SMOLLM2, 1.0, 8192).table()
    assert (table.shape, table.dtype) == ((8192, 32), np.float32)
    assert hashlib.sha256(table.astype("<f4").tobytes()).hexdigest() == DIGESTS[function]


@pytest.mark.parametrize("function", ["cos", "sin"])
def test_a_long_table_is_exact(function: Function) -> None:
    frequencies = np.array([1.0, 0.75, 0.1, 1e-3, 1e-6, 1e-20, 0.0, np.pi / 2, -0.3], np.float32)
    table = Rotary(function, frequencies, 1.0, 131072).table()
    assert apart(table, expected(function, frequencies, 131072)) <= 1


@pytest.mark.parametrize("function", ["cos", "sin"])
def test_angles_next_to_quarter_turns_are_exact(function: Function) -> None:
    """There the reduction loses the most: what is left of the angle is as small as 1e-9."""
    turns = np.arange(1, 83_000)
    near = (turns * (np.pi / 2)).astype(np.float32)
    table = Rotary(function, near[near < 2**23], 1.0, 2).table()[1]  # position 1: the frequency is the angle
    assert apart(table, expected(function, near[near < 2**23], 2)[1]) <= 1


def test_the_scale_is_applied_in_float32() -> None:
    plain = Rotary("cos", SMOLLM2, 1.0, 300).table()
    assert np.array_equal(Rotary("cos", SMOLLM2, 1.19, 300).table(), plain * np.float32(1.19))


def test_other_tensors_are_none() -> None:
    inline = onnx.numpy_helper.from_array(np.zeros((4, 4), np.float32), "table")
    assert not is_placeholder(inline)
    outside = onnx.TensorProto(name="w", data_location=onnx.TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="layer.3")
    assert not is_placeholder(outside)


def damaged(dims: tuple[int, ...] = (4, 2), kind: int = onnx.TensorProto.FLOAT, **metadata: str) -> onnx.TensorProto:
    """A placeholder with some of its facts replaced; an empty one is left out."""
    facts = {"function": "cos", "frequencies": np.ones(2, "<f4").tobytes().hex(), "scale": "0000803f", **metadata}
    tensor = onnx.TensorProto(name="t", dims=dims, data_type=kind, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=LOCATION)
    for key, value in facts.items():
        if value:
            tensor.metadata_props.add(key=key, value=value)
    return tensor


def test_the_undamaged_one_is_read() -> None:
    assert parse(damaged()).table().shape == (4, 2)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (damaged(function="tan"), "no function 'tan'"),
        (damaged(function=""), "lacks its 'function'"),
        (damaged(frequencies=""), "lacks its 'frequencies'"),
        (damaged(frequencies="0000803"), "damaged"),
        (damaged(frequencies="zz"), "damaged"),
        (damaged(frequencies="0000803f"), "1 frequencies for 2 angles"),
        (damaged(frequencies="0000803f0000c07f"), "no usable number"),  # not a number
        (damaged(frequencies="0000803f0000807f"), "no usable number"),  # infinite
        (damaged(frequencies="0000803f0000804b"), "no usable number"),  # 2 ** 24: angles beyond the reduction
        (damaged(scale=""), "lacks its 'scale'"),
        (damaged(scale="0000807f"), "no usable number"),
        (damaged(scale="0000803f0000803f"), "damaged"),
        (damaged(dims=(4,)), "none of positions and angles"),
        (damaged(dims=(0, 2)), "none of positions and angles"),
        (damaged(dims=(4, -2)), "none of positions and angles"),
        (damaged(kind=onnx.TensorProto.INT64), "none of positions and angles"),
        (damaged(dims=(MAX_TABLE_BYTES // 8 + 1, 2)), "larger than 128 MiB"),
    ],
)
def test_a_damaged_placeholder_is_refused(tensor: onnx.TensorProto, words: str) -> None:
    with pytest.raises(ModelError, match=rf"rotary table t of the graph .*{words}.*fetch it again"):
        parse(tensor)
