"""Block quantisation: what the kernels of ONNX Runtime compute is what `dequantise` says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from meshnode.engine.runtime import ort as onnxruntime
from meshnode.publisher.expression import Array
from meshnode.publisher.precision import BLOCK, PRECISIONS, Packing
from meshnode.publisher.quantise import Packed, dequantise, packed_shapes, quantise

INT8, INT4 = Packing(8, False), Packing(4, True)
PACKINGS = pytest.mark.parametrize("packing", [INT8, INT4], ids=["int8", "int4"])


def matrix(rows: int, columns: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def run(op: str, inputs: dict[str, Array], attributes: dict[str, int]) -> Array:
    kinds = {np.dtype("f4"): 1, np.dtype("u1"): 2, np.dtype("i8"): 7}
    node = helper.make_node(op, list(inputs), ["y"], domain="com.microsoft", **attributes)
    values = [helper.make_tensor_value_info(n, kinds[v.dtype], v.shape) for n, v in inputs.items()]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", 1, None)])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def parts(packed: Packed, table: bool = False) -> dict[str, Array]:
    data = packed.data.reshape(len(packed.data), -1) if table else packed.data
    found = {"data": data, "scales": packed.scales}
    return found if packed.zero_points is None else {**found, "zeros": packed.zero_points}


@PACKINGS
@pytest.mark.parametrize("columns", [32, 64, 96, 576])
def test_the_embedding_kernel_reads_our_layout(packing: Packing, columns: int) -> None:
    packed = quantise(matrix(40, columns), packing)
    ids = np.array([[3, 0, 39, 7]])
    named = parts(packed, table=True)
    data = named.pop("data")
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": packing.bits}
    rows = run("GatherBlockQuantized", {"data": data, "ids": ids, **named}, attributes)
    assert np.allclose(rows[0], dequantise(packed, packing, columns)[ids[0]], atol=1e-6)


@PACKINGS
@pytest.mark.parametrize("columns", [32, 80, 96, 576])
def test_the_product_kernel_reads_our_layout(packing: Packing, columns: int) -> None:
    packed = quantise(matrix(24, columns), packing)
    x = matrix(5, columns, seed=1)
    attributes = {"K": columns, "N": 24, "bits": packing.bits, "block_size": BLOCK, "accuracy_level": 1}
    y = run("MatMulNBits", {"x": x, **parts(packed)}, attributes)
    assert np.allclose(y, x @ dequantise(packed, packing, columns).T, atol=1e-4)


@PACKINGS
def test_shapes_are_as_announced(packing: Packing) -> None:
    for columns in (32, 80, 96, 576):
        packed = quantise(matrix(8, columns), packing)
        assert [v.shape for v in parts(packed).values()] == list(packed_shapes(8, columns, packing))


def test_errors_are_those_of_8_and_4_bits() -> None:
    weight = matrix(64, 576)
    for packing, most in ((INT8, 0.006), (INT4, 0.085)):
        error = dequantise(quantise(weight, packing), packing, 576) - weight
        assert np.sqrt(np.square(error).mean()) < most


def test_the_search_beats_plain_rounding() -> None:
    blocks = matrix(2048, BLOCK)
    low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
    scale = ((high - low) / 15)[:, None]
    zero = np.rint(-low[:, None] / scale)
    plain = (np.clip(np.rint(blocks / scale) + zero, 0, 15) - zero) * scale - blocks
    found = dequantise(quantise(blocks, INT4), INT4, BLOCK) - blocks
    assert np.square(found).mean() < 0.95 * np.square(plain).mean()


def test_important_columns_are_rounded_better() -> None:
    weight = matrix(512, BLOCK)
    importance = np.ones(BLOCK, np.float32)
    importance[:4] = 100
    with_it = dequantise(quantise(weight, INT4, importance), INT4, BLOCK) - weight
    without = dequantise(quantise(weight, INT4), INT4, BLOCK) - weight
    assert np.square(with_it[:, :4]).mean() < 0.7 * np.square(without[:, :4]).mean()


def test_the_order_of_the_threads_does_not_matter() -> None:
    weight = matrix(3000, 96)
    first, second = quantise(weight, INT4), quantise(weight, INT4)
    assert all(np.array_equal(a, b) for a, b in zip(parts(first).values(), parts(second).values(), strict=True))


@PACKINGS
@settings(max_examples=40)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=BLOCK, max_size=BLOCK),
)
def test_any_block_keeps_its_range(packing: Packing, values: list[float]) -> None:
    block = np.array([values], np.float32)
    back = dequantise(quantise(block, packing), packing, BLOCK)
    assert np.isfinite(back).all()
    width = max(float(block.max()), 0) - min(float(block.min()), 0)
    assert np.abs(back - block).max() <= width * (0.005 if packing.bits == 8 else 0.3) + 1e-20


@PACKINGS
def test_zeros_stay_zeros(packing: Packing) -> None:
    assert not dequantise(quantise(np.zeros((2, 64), np.float32), packing), packing, 64).any()


def test_every_precision_has_its_own_kernel_class() -> None:
    assert len({p.kernel_class for p in PRECISIONS.values()}) == len(PRECISIONS)
    assert PRECISIONS["int4"].packing_of("model.layers.3.self_attn.v_proj.weight") == INT8
    assert PRECISIONS["int4"].packing_of("model.layers.3.self_attn.qk_proj.weight") == INT4
