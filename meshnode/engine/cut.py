"""Cuts a segment out of the weightless graph of a model.

A segment is the run of layers [first, last), or the head alone. Its graph holds no weights and no path of a file:
every initializer that is more than a few bytes is only named, and handed to onnxruntime as a view of the mapped file.
Rotary tables are handed over the same way; most graphs say only how to compute them (`rotary.py`).
Works on the protobuf itself: onnx_ir would cost the engine process 50 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import onnx

from meshnode.core.errors import ModelError
from meshnode.engine.backend import Array
from meshnode.engine.graph_check import HANDED_OVER, check_graph
from meshnode.engine.graph_file import GraphFile
from meshnode.engine.graph_wire import Refused
from meshnode.engine.lora import Product, Widths, insert, products
from meshnode.engine.rotary import is_placeholder, parse

_INLINE_BYTES: Final = 1024  # smaller constants stay in the graph: onnxruntime folds them
_LOGIT_STEPS: Final = 8  # of scaling and capping, behind the product that makes logits
_PRODUCTS: Final = frozenset({"MatMulNBits", "FusedMatMul", "MatMul", "Gemm"})
_ROWS: Final = ("batch", "sequence", "hidden")
_TYPES: Final[dict[int, np.dtype[Any]]] = {
    onnx.TensorProto.FLOAT: np.dtype("<f4"),
    onnx.TensorProto.UINT8: np.dtype("u1"),
    onnx.TensorProto.INT64: np.dtype("<i8"),
    onnx.TensorProto.INT32: np.dtype("<i4"),
}


@dataclass(frozen=True, slots=True)
class View:
    """A tensor inside a group file."""

    group: str  # "embed", "layer.7", "head"
    offset: int  # bytes from the start of the file
    length: int  # bytes
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """A graph to open, and what it must be given."""

    model: bytes  # serialized ONNX ModelProto
    inputs: tuple[str, ...]  # the first one carries the rows
    outputs: tuple[str, ...]  # here too
    views: dict[str, View]  # initializer -> its bytes in a group file
    tables: dict[str, Callable[[], Array]]  # rotary table -> computes or reads it; worth doing once
    products: tuple[Product, ...]  # those that take factors of adapters, as optional inputs (`lora.py`)


class WeightlessGraph:
    """The graph of a whole model, read from a file. Costs a few MB: let it go after cutting."""

    def __init__(self, file: GraphFile) -> None:
        """Raises ModelError when there is no graph in the file that may be run."""
        self._model = file.model()
        graph = self._model.graph
        self._source = file.source
        self._nodes = list(graph.node)
        self._producer = {name: i for i, node in enumerate(self._nodes) for name in node.output if name}
        self._initializers = {t.name: t for t in graph.initializer}
        self._values = {v.name: v for v in (*graph.value_info, *graph.output, *graph.input)}
        self._inputs = {v.name for v in graph.input} - self._initializers.keys()

    def products(self, widths: Widths) -> list[Product]:
        """The matrix products of its layers that can take factors of adapters."""
        return products(self._nodes, self._initializers, widths)

    def layers(self, first: int, last: int, adapted: Collection[Product] = ()) -> Cut:
        """The segment of the layers [first, last): input_ids or hidden states in, hidden states out.

        adapted: of `products`; those of these layers take factors.
        """
        start = "input_ids" if first == 0 else f"hidden_states.{first - 1}"
        outputs = [f"hidden_states.{last - 1}"]
        outputs += [f"present.{i}.{part}" for i in range(first, last) for part in ("key", "value")]
        return self._cut(start, outputs, tuple(p for p in adapted if first <= p.layer < last))

    def head(self, layers: int) -> Cut:
        """The final norm and the head: hidden states of the last layer in, logits out."""
        return self._cut(f"hidden_states.{layers - 1}", ["logits"])

    def norm(self, layers: int) -> Cut:
        """The final norm: hidden states of the last layer in, what the head makes logits of out.

        Raises ModelError where the graph makes its logits in another way.
        """
        name = "logits"
        for _ in range(_LOGIT_STEPS):
            index = self._producer.get(name)
            node = None if index is None else self._nodes[index]
            if node is None or not node.input:
                break
            name = node.input[0]
            if node.op_type in _PRODUCTS:
                self._values[name] = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, _ROWS)
                return self._cut(f"hidden_states.{layers - 1}", [name])
        raise ModelError(f"The graph {self._source} has no final norm before its logits, so it gives no embeddings.")

    def _cut(self, start: str, outputs: list[str], adapted: tuple[Product, ...] = ()) -> Cut:
        wanted, inputs, initializers = self._behind(start, outputs)
        graph = onnx.GraphProto(name="segment")
        order = sorted(wanted)  # that of the file, which is topological
        graph.node.extend(self._nodes[i] for i in order)
        names = [start, *sorted(inputs - {start})]
        graph.input.extend(self._value(name) for name in names)
        graph.output.extend(self._value(name) for name in outputs)
        views: dict[str, View] = {}
        tables: dict[str, Callable[[], Array]] = {}
        for name in sorted(initializers):
            tensor = self._initializers[name]
            if is_placeholder(tensor):
                tables[name] = parse(tensor).table
                graph.initializer.append(_placeholder(tensor))
            elif tensor.data_location == onnx.TensorProto.EXTERNAL:
                views[name] = self._view(tensor)
                graph.initializer.append(_placeholder(tensor))
            elif tensor.ByteSize() > _INLINE_BYTES:
                tables[name] = partial(_inline, tensor)
                graph.initializer.append(_placeholder(tensor))
            else:
                graph.initializer.append(tensor)
        insert(graph, adapted, {index: place for place, index in enumerate(order)})
        model = onnx.ModelProto(ir_version=self._model.ir_version, opset_import=self._model.opset_import, graph=graph)
        try:
            check_graph(model, cut=True)
        except Refused as error:
            raise ModelError(f"A part of the graph {self._source} is not run: {error}.") from error
        return Cut(model.SerializeToString(), tuple(names), tuple(outputs), views, tables, adapted)

    def _behind(self, start: str, outputs: list[str]) -> tuple[set[int], set[str], set[str]]:
        """Nodes, graph inputs and initializers that `outputs` need when `start` is given."""
        nodes: set[int] = set()
        inputs: set[str] = set()
        initializers: set[str] = set()
        seen = {start, ""}
        queue = list(outputs)
        while queue:
            name = queue.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in self._initializers:
                initializers.add(name)
            elif name in self._inputs:
                inputs.add(name)
            elif name in self._producer:
                index = self._producer[name]
                if index not in nodes:
                    nodes.add(index)
                    queue.extend(self._nodes[index].input)
            else:
                raise ModelError(f"The graph {self._source} has no {name}: it was made for another model or version.")
        return nodes, inputs, initializers

    def _value(self, name: str) -> onnx.ValueInfoProto:
        if name not in self._values:
            raise ModelError(f"The graph {self._source} does not say what {name} is: it was made by another version.")
        return self._values[name]

    def _view(self, tensor: onnx.TensorProto) -> View:
        where = {entry.key: entry.value for entry in tensor.external_data}
        try:
            dtype = _TYPES[tensor.data_type]
            view = View(where["location"], int(where["offset"]), int(where["length"]), dtype, tuple(tensor.dims))
        except (KeyError, ValueError) as error:
            raise ModelError(
                f"The graph {self._source} describes {tensor.name} in an unknown way ({error})."
            ) from error
        if int(np.prod(view.shape)) * dtype.itemsize != view.length:
            raise ModelError(f"The graph {self._source} gives {tensor.name} {view.length} bytes for {view.shape}.")
        return view


def _inline(tensor: onnx.TensorProto) -> Array:
    """The value that the graph holds, in memory of its own: the graph can go."""
    return np.array(onnx.numpy_helper.to_array(tensor))


def _placeholder(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """The same tensor without its bytes."""
    out = onnx.TensorProto(
        name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, data_location=onnx.TensorProto.EXTERNAL
    )
    out.external_data.add(key="location", value=HANDED_OVER)
    return out
