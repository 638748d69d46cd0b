"""Any frequencies give tables within one unit of the last place; any bytes give a table or a ModelError."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.core.errors import ModelError
from meshnode.engine.rotary import Function, Rotary, is_placeholder, parse
from tests.unit.test_rotary import apart, expected

FREQUENCIES = st.lists(st.floats(-64, 64, width=32, allow_subnormal=False), min_size=1, max_size=8)
FUNCTIONS = st.sampled_from(("cos", "sin"))


@settings(max_examples=60)
@given(FREQUENCIES, st.integers(1, 5000), FUNCTIONS)
def test_tables_are_exact(frequencies: list[float], positions: int, function: Function) -> None:
    values = np.array(frequencies, np.float32)
    table = Rotary(function, values, 1.0, positions).table()
    assert apart(table, expected(function, values, positions)) <= 1


@settings(max_examples=60)
@given(FREQUENCIES, st.integers(1, 600), st.integers(1, 600), FUNCTIONS)
def test_a_row_depends_on_its_position_alone(
    frequencies: list[float], one: int, other: int, function: Function
) -> None:
    values = np.array(frequencies, np.float32)
    shared = min(one, other)
    tables = [Rotary(function, values, 1.0, positions).table()[:shared] for positions in (one, other)]
    assert tables[0].tobytes() == tables[1].tobytes()


@settings(max_examples=60)
@given(FREQUENCIES, st.floats(0, 8, width=32), st.integers(1, 10_000), FUNCTIONS)
def test_placeholders_round_trip(frequencies: list[float], scale: float, positions: int, function: Function) -> None:
    rotary = Rotary(function, np.array(frequencies, np.float32), scale, positions)
    tensor = onnx.TensorProto.FromString(rotary.placeholder("t").SerializeToString())
    assert is_placeholder(tensor) and tensor.ByteSize() < 500
    read = parse(tensor)
    assert (read.function, read.scale, read.positions) == (function, scale, positions)
    assert read.frequencies.tobytes() == rotary.frequencies.tobytes()


@settings(max_examples=200)
@given(st.data())
def test_damage_gives_a_table_or_a_sentence(data: st.DataObject) -> None:
    whole = bytearray(Rotary("cos", np.ones(4, np.float32), 1.0, 8).placeholder("t").SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    tensor = onnx.TensorProto()
    with suppress(Exception):  # no protobuf any more: that is seen before anybody looks for a placeholder
        tensor.ParseFromString(bytes(whole))
    with suppress(ModelError):
        read = parse(tensor)
        if read.positions < 1_000:
            assert read.table().shape == (read.positions, len(read.frequencies))
