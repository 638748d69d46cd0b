"""Where a cut graph takes the factors of adapters: y = W x + B (A x), beside its matrix products.

A graph is made of a model's linear layers, but packs some of them into one product (q with k and v, gate with up),
by precision differently. Each product gets one pair of optional inputs, A (inputs, rank) and B (rank, outputs), for
all of its linear layers together: their A side by side, their B in the columns that are theirs. Where no session
binds them they have rank 0, and x A B is a row of zeros.

The sum goes behind the bias, if there is one: a product and its bias are fused into one kernel, which rounds once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx

from meshnode.engine.backend import Array
from meshnode.model.adapter_file import Pair

# a weight of a linear layer as the publisher names it: "model.layers.7.self_attn.qk_proj.weight.data"
_WEIGHT: Final = re.compile(
    r"(?:.+\.)?layers\.(0|[1-9][0-9]{0,3})\.(?:self_attn|mlp)\.([a-z_]{1,20})_proj\.weight(?:\.data)?"
)
_STEMS: Final = frozenset(("q", "k", "v", "o", "gate", "up", "down"))
_PRODUCTS: Final = ("MatMul", "MatMulNBits")


@dataclass(frozen=True, slots=True)
class Widths:
    """Outputs of the linear layers of attention, which a packed product does not tell."""

    query: int
    key: int  # and of the values

    def of(self, stem: str) -> int:
        return self.query if stem == "q" else self.key


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product of a layer, and which linear layers it is."""

    layer: int
    name: str  # of its optional inputs, without ".A" and ".B"
    node: int  # index in the graph
    inputs: int
    columns: Mapping[str, range]  # target -> its columns of the output

    @property
    def names(self) -> tuple[str, str]:
        """Of its optional inputs A (inputs, rank) and B (rank, outputs)."""
        return f"{self.name}.A", f"{self.name}.B"


def products(
    nodes: Collection[onnx.NodeProto], initializers: Mapping[str, onnx.TensorProto], widths: Widths
) -> list[Product]:
    """The products of a graph that can take factors."""
    found = []
    for index, node in enumerate(nodes):
        if node.op_type not in _PRODUCTS or len(node.input) < 2 or node.input[1] not in initializers:
            continue
        named = _WEIGHT.fullmatch(node.input[1])
        if named is None:
            continue
        layer, stem = int(named[1]), named[2]
        inputs, outputs = _sizes(node, initializers[node.input[1]])
        columns = _columns(stem, outputs, widths)
        if columns:
            found.append(Product(layer, f"lora.{layer}.{stem}", index, inputs, columns))
    return found


def _sizes(node: onnx.NodeProto, weight: onnx.TensorProto) -> tuple[int, int]:
    """Inputs and outputs of a product."""
    if node.op_type == "MatMul":
        return (weight.dims[0], weight.dims[1]) if len(weight.dims) == 2 else (0, 0)
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    return sizes.get("K", 0), sizes.get("N", 0)


def _columns(stem: str, outputs: int, widths: Widths) -> dict[str, range]:
    """Which columns are whose; empty when the product is of another kind."""
    parts = [stem] if stem in _STEMS else stem.split("_") if "_" in stem else list(stem)
    if len(set(parts)) != len(parts) or not _STEMS.issuperset(parts):
        return {}
    if len(parts) == 1:
        sizes = [outputs]
    elif _ATTENTION.issuperset(parts):
        sizes = [widths.of(part) for part in parts]
    else:
        sizes = [outputs // len(parts)] * len(parts)  # gate and up are alike
    if sum(sizes) != outputs:
        return {}
    ends = np.cumsum([0, *sizes]).tolist()
    return {f"{part}_proj": range(a, b) for part, a, b in zip(parts, ends, ends[1:], strict=False)}


_ATTENTION: Final = frozenset(("q", "k", "v"))


def insert(graph: onnx.GraphProto, chosen: Iterable[Product], origin: Mapping[int, int]) -> None:
    """Give products of a cut graph their optional inputs.

    Args:
      graph: what was cut; its nodes in topological order.
      origin: index of a product's node in the whole graph -> index in this one.
    """
    initializers = {tensor.name for tensor in graph.initializer}
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            readers.setdefault(name, []).append(index)
    after: dict[int, list[onnx.NodeProto]] = {}
    for product in chosen:
        index = origin[product.node]
        x = graph.node[index].input[0]
        behind = _behind_bias(graph, index, readers, initializers)
        outputs = max(columns.stop for columns in product.columns.values())
        after.setdefault(behind, []).extend(_addition(graph, product, x, graph.node[behind], outputs))
    nodes = [other for i, node in enumerate(graph.node) for other in (node, *after.get(i, ()))]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)


def _behind_bias(
    graph: onnx.GraphProto, index: int, readers: Mapping[str, list[int]], initializers: Collection[str]
) -> int:
    """The node whose output is the linear layer's: the product, or the addition of its bias."""
    using = readers.get(graph.node[index].output[0], [])
    if len(using) == 1:
        node = graph.node[using[0]]
        if node.op_type == "Add" and any(name in initializers for name in node.input):
            return using[0]
    return index


def _addition(
    graph: onnx.GraphProto, product: Product, x: str, node: onnx.NodeProto, outputs: int
) -> list[onnx.NodeProto]:
    """Nodes that add x A B to the output of `node`, under the name that it had."""
    a, b = product.names
    rank = f"{product.name}.rank"
    for name, shape, axes in ((a, (product.inputs, 0), [product.inputs, rank]), (b, (0, outputs), [rank, outputs])):
        graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
        graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes))
    y, plain = node.output[0], f"{product.name}.plain"
    node.output[0] = plain
    low, high = f"{product.name}.low", f"{product.name}.high"
    return [
        onnx.helper.make_node("MatMul", [x, a], [low], name=low),
        onnx.helper.make_node("MatMul", [low, b], [high], name=high),
        onnx.helper.make_node("Add", [plain, high], [y], name=f"{product.name}.sum"),
    ]


def packed(product: Product, pairs: Mapping[str, Pair], scale: float) -> tuple[Array, ...]:
    """A (inputs, ranks) and B (ranks, outputs) of a product, B scaled; nothing if no target of it has factors."""
    given = [(columns, pairs[target]) for target, columns in product.columns.items() if target in pairs]
    if not given:
        return ()
    a = np.ascontiguousarray(np.concatenate([pair.a for _, pair in given]).T, np.float32)
    outputs = max(columns.stop for columns in product.columns.values())
    b = np.zeros((a.shape[1], outputs), np.float32)
    row = 0
    for columns, pair in given:
        rank = pair.a.shape[0]
        b[row : row + rank, columns.start : columns.stop] = pair.b.T * np.float32(scale)
        row += rank
    return a, b
