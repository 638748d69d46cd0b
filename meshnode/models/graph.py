"""The weightless graph of a whole model, and which weights of which group it wants.

    hidden_states.k is the output of layer k. Between two of them lies exactly one layer, so any cut
    [a, b) is: inputs hidden_states.{a-1} (or input_ids), outputs hidden_states.{b-1} (or logits).

`plan_graph` asks mobius for the graph with every layer boundary as an output (so that no fusion reaches across
one and every cut gives the same numbers), replaces each matrix by one initializer that points into a group
file, and swaps the operators of quantised variants. Constant arithmetic on weights (packing Q, K and V into one
matrix, transposing) becomes a recipe that is carried out when the group file is written.

Runs in the publisher only: mobius imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from meshnode.core.errors import ModelError
from meshnode.models.groups import Group, Stored
from meshnode.models.precision import BLOCK, Precision
from meshnode.models.quantise import Packed, packed_shapes, quantise

Array = np.ndarray[Any, Any]
Reader = Callable[[str], Array]  # name of a weight in the architecture -> float32 array

_SOURCE: Final = "checkpoint:"  # the builder's initializers, so that ours can have the plain names
_CONTRIB: Final = "com.microsoft"
_ROTARY = re.compile(r"\.(cos|sin)_cache$")
_SHARED_INPUTS: Final = frozenset(("attention_mask", "position_ids"))


@dataclass(slots=True)
class Plan:
    """What `plan_graph` found: a graph and the content of every group file."""

    graph: bytes  # serialized ONNX ModelProto
    groups: dict[str, Group]  # "layer.0", ..., and the ends
    tied: bool  # embedding and head are one file, named "embed"
    recipes: dict[str, Recipe] = field(default_factory=dict)  # by name of the stored tensor

    def read(self, name: str, weights: Reader) -> Array:
        """Compute one stored tensor from the checkpoint's weights."""
        return self.recipes[name].read(weights)


@dataclass(slots=True)
class Recipe:
    """How a stored tensor comes out of the checkpoint: a constant expression, then quantisation."""

    value: ir.Value
    transpose: bool
    part: str  # "plain", or "data", "scales", "zero_points" of the quantised matrix
    precision: Precision
    shared: dict[str, Packed]  # result of the quantisation, kept until its last part is read

    def read(self, weights: Reader) -> Array:
        if self.part == "plain":
            return self._plain(weights)
        key = self.value.name or ""
        if key not in self.shared:
            self.shared.clear()
            self.shared[key] = quantise(self._plain(weights), self.precision)
        packed = getattr(self.shared[key], self.part)
        return np.asarray(packed)

    def _plain(self, weights: Reader) -> Array:
        array = evaluate(self.value, weights)
        return np.ascontiguousarray(array.T if self.transpose else array)


# ---------------------------------------------------------------- constant expressions


def _is_weight(value: ir.Value | None) -> bool:
    """A checkpoint weight: an initializer that has no value yet."""
    return value is not None and value.is_initializer() and value.const_value is None


def _is_recipe(value: ir.Value | None) -> bool:
    """A weight, or something computed from weights and constants alone."""
    if value is None:
        return False
    if value.is_initializer():
        return value.const_value is None
    node = value.producer()
    if node is None or node.op_type not in _OPERATORS:
        return False
    inputs = [i for i in node.inputs if i is not None]
    return any(_is_recipe(i) for i in inputs) and all(_is_recipe(i) or _is_constant(i) for i in inputs)


def _is_constant(value: ir.Value | None) -> bool:
    if value is None:
        return False
    if value.is_initializer():
        return value.const_value is not None
    node = value.producer()
    return node is not None and node.op_type == "Constant"


_OPERATORS: Final[Mapping[str, Callable[[ir.Node, list[Array]], Array]]] = {
    "Concat": lambda node, x: np.concatenate(x, axis=node.attributes["axis"].as_int()),
    "Transpose": lambda node, x: np.transpose(
        x[0], node.attributes["perm"].as_ints() if "perm" in node.attributes else None
    ),
    "Identity": lambda _node, x: x[0],
}


def _weight_name(value: ir.Value) -> str:
    """Name of a checkpoint weight in the architecture; the planner has set it apart with a prefix."""
    return (value.name or "").removeprefix(_SOURCE)


def evaluate(value: ir.Value, weights: Reader) -> Array:
    """Carry out a constant expression over weights."""
    if value.is_initializer():
        if value.const_value is not None:
            return np.asarray(value.const_value.numpy())
        return weights(_weight_name(value))
    node = value.producer()
    assert node is not None  # _is_recipe held
    return _OPERATORS[node.op_type](node, [evaluate(i, weights) for i in node.inputs if i is not None])


def _sources(value: ir.Value) -> list[str]:
    """Names of the checkpoint weights in a constant expression, in order."""
    if value.is_initializer():
        return [_weight_name(value)]
    node = value.producer()
    assert node is not None
    return [name for i in node.inputs if i is not None for name in _sources(i)]


def _shape(value: ir.Value) -> tuple[int, ...]:
    """Shape of a constant expression, without touching the weights."""
    if value.is_initializer():
        assert value.shape is not None
        return tuple(int(d) for d in value.shape)
    node = value.producer()
    assert node is not None
    shapes = [_shape(i) for i in node.inputs if i is not None]
    if node.op_type == "Concat":
        axis = node.attributes["axis"].as_int()
        out = list(shapes[0])
        out[axis] = sum(s[axis] for s in shapes)
        return tuple(out)
    if node.op_type == "Transpose":
        perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(shapes[0]))[::-1]
        return tuple(shapes[0][p] for p in perm)
    return shapes[0]


def _joint_name(names: list[str]) -> str:
    """`a.q_proj.weight, a.k_proj.weight, a.v_proj.weight` -> `a.qkv_proj.weight`."""
    if len(names) == 1:
        return names[0]
    parts = [n.split(".") for n in names]
    same = [len(set(column)) == 1 for column in zip(*parts, strict=False)]
    if len({len(p) for p in parts}) != 1 or same.count(False) != 1:
        return "+".join(names)
    at = same.index(False)
    words = [p[at] for p in parts]
    tail = "_proj" if all(w.endswith("_proj") for w in words) else ""
    stems = [w.removesuffix(tail) if tail else w for w in words]
    joined = "".join(stems) if all(len(s) == 1 for s in stems) else "_".join(stems)
    return ".".join([*parts[0][:at], joined + tail, *parts[0][at + 1 :]])


# ---------------------------------------------------------------- layers


def _between(outputs: list[ir.Value], stops: set[ir.Value]) -> tuple[set[ir.Node], set[str]]:
    """Nodes that `outputs` need, going back to `stops`; and the names of the graph inputs met."""
    nodes: set[ir.Node] = set()
    inputs: set[str] = set()
    queue = list(outputs)
    seen: set[ir.Value] = set(stops)
    while queue:
        value = queue.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is None:
            if not value.is_initializer():
                inputs.add(value.name or "")
            continue
        nodes.add(node)
        queue.extend(i for i in node.inputs if i is not None)
    return nodes, inputs


def _assign(graph: ir.Graph, family: str, layers: int) -> dict[ir.Node, set[str]]:
    """Which segments ("layer.k", "head") use each node. Raises ModelError when the graph can't be cut."""
    outputs = {o.name: o for o in graph.outputs}
    edges = []
    for k in range(layers):
        edge = outputs.get(f"hidden_states.{k}")
        if edge is None:
            raise ModelError(
                f"Models of the architecture {family!r} can't be cut into layers: the graph builder gives no name "
                f"to the output of layer {k}. Llama, Mistral, Qwen2, Qwen3 and Phi-3 models can."
            )
        edges.append(edge)
    owners: dict[ir.Node, set[str]] = {}
    for k in range(layers + 1):
        name = f"layer.{k}" if k < layers else "head"
        wanted = [outputs["logits"]] if k == layers else [edges[k]]
        wanted += [outputs[f"present.{k}.{x}"] for x in ("key", "value") if f"present.{k}.{x}" in outputs]
        nodes, inputs = _between(wanted, {edges[k - 1]} if k else set())
        allowed = _SHARED_INPUTS | {f"past_key_values.{k}.key", f"past_key_values.{k}.value"}
        foreign = sorted(inputs - allowed - ({"input_ids"} if k == 0 else set()))
        if foreign:
            raise ModelError(
                f"Models of the architecture {family!r} can't be cut into layers: {name} reads {foreign[0]}, "
                f"which belongs to another layer."
            )
        for node in nodes:
            owners.setdefault(node, set()).add(name)
    return owners


# ---------------------------------------------------------------- the plan


class _Planner:
    def __init__(self, graph: ir.Graph, family: str, layers: int, precision: Precision) -> None:
        self.graph = graph
        self.family = family
        self.precision = precision
        self.owners = _assign(graph, family, layers)
        self.groups = {name: Group(name) for name in ("embed", *(f"layer.{k}" for k in range(layers)), "head")}
        self.recipes: dict[str, Recipe] = {}
        self.shared: dict[str, Packed] = {}
        self.external: list[tuple[ir.Value, str, str]] = []  # initializer, group, stored tensor
        for value in list(graph.initializers.values()):
            if value.const_value is None:
                value.name = _SOURCE + (value.name or "")
        self.tied = self._is_tied()

    def run(self) -> None:
        for node in list(self.graph):
            if any(_is_recipe(o) for o in node.outputs):
                continue  # part of an expression: goes away with the last use of it
            recipes = [(i, v) for i, v in enumerate(node.inputs) if v is not None and _is_recipe(v)]
            if not recipes:
                continue
            group = self._group(node)
            if node.op_type == "Gather" and recipes[0][0] == 0 and len(_shape(recipes[0][1])) == 2:
                self._table(node, recipes[0][1])
            elif node.op_type == "MatMul" and recipes[0][0] == 1 and len(_shape(recipes[0][1])) == 2:
                self._matrix(node, recipes[0][1], group)
            else:
                for index, value in recipes:
                    stored = self._store(group, value, "F32", _shape(value), _joint_name(_sources(value)))
                    node.replace_input_with(index, self._initializer(stored, group))

    def _group(self, node: ir.Node) -> str:
        owners = self.owners.get(node, set())
        if len(owners) != 1:
            raise ModelError(
                f"Models of the architecture {self.family!r} can't be cut into layers: {node.name} uses a weight "
                f"that several layers share."
            )
        (owner,) = owners
        reads_ids = any(i is not None and i.name == "input_ids" for i in node.inputs)
        return "embed" if node.op_type == "Gather" and reads_ids else owner

    def _is_tied(self) -> bool:
        """Whether the head's matrix is the embedding table."""
        tables = [n.inputs[0] for n in self.graph if n.op_type == "Gather" and _is_weight(n.inputs[0])]
        heads = [
            _sources(n.inputs[1])
            for n in self.graph
            if n.op_type == "MatMul" and self.owners.get(n) == {"head"} and _is_recipe(n.inputs[1])
        ]
        return any(t is not None and _sources(t) in heads for t in tables)

    def _file(self, group: str) -> Group:
        return self.groups["embed" if self.tied and group == "head" else group]

    def _store(
        self,
        group: str,
        value: ir.Value,
        dtype: str,
        shape: tuple[int, ...],
        name: str,
        part: str = "plain",
        transpose: bool = False,
    ) -> Stored:
        stored = Stored(name, dtype, shape)
        self._file(group).add(stored)
        self.recipes[name] = Recipe(value, transpose, part, self.precision, self.shared)
        return stored

    def _initializer(self, stored: Stored, group: str, shape: tuple[int, ...] | None = None) -> ir.Value:
        """A graph initializer over the bytes of a stored tensor, in the view `shape`."""
        name = stored.name if group != "head" or not self.tied else f"head.{stored.name}"
        for value, _, known in self.external:
            if value.name == name and known == stored.name:
                return value
        kind = ir.DataType.FLOAT if stored.dtype == "F32" else ir.DataType.UINT8
        value = ir.Value(name=name, shape=ir.Shape(shape or stored.shape), type=ir.TensorType(kind))
        self.external.append((value, group, stored.name))
        return value

    def _pack(self, group: str, value: ir.Value, name: str, rows: int, columns: int, transpose: bool) -> list[Stored]:
        shapes = packed_shapes(rows, columns, self.precision)
        parts = (("data", "U8"), ("scales", "F32"), ("zero_points", "U8"))
        return [
            self._store(group, value, dtype, shape, f"{name}.{part}", part, transpose)
            for (part, dtype), shape in zip(parts, shapes, strict=False)
        ]

    def _table(self, node: ir.Node, value: ir.Value) -> None:
        """The embedding: Gather, or GatherBlockQuantized over the packed bytes."""
        rows, columns = _shape(value)
        name = _joint_name(_sources(value))
        if not self.precision.quantised:
            stored = self._store("embed", value, "F32", (rows, columns), name)
            node.replace_input_with(0, self._initializer(stored, "embed"))
            return
        packed = self._pack("embed", value, name, rows, columns, transpose=False)
        bits = self.precision.bits
        views = [(rows, columns * bits // 8), packed[1].shape, *(s.shape for s in packed[2:])]
        data, scales, *zeros = (self._initializer(s, "embed", view) for s, view in zip(packed, views, strict=True))
        self._replace(
            node,
            "GatherBlockQuantized",
            [data, node.inputs[1], scales, *zeros],
            {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": bits},
        )

    def _matrix(self, node: ir.Node, value: ir.Value, group: str) -> None:
        """A matrix [inputs, outputs] of a layer or the head."""
        columns, rows = _shape(value)
        name = _joint_name(_sources(value))
        if self.precision.quantised:
            packed = self._pack(group, value, name, rows, columns, transpose=True)
            inputs = [node.inputs[0], *(self._initializer(s, group) for s in packed)]
            self._replace(
                node,
                "MatMulNBits",
                inputs,
                {"K": columns, "N": rows, "bits": self.precision.bits, "block_size": BLOCK, "accuracy_level": 4},
            )
        elif group == "head" and self.tied:  # the same bytes as the table: multiplied as they lie
            stored = self._store(group, value, "F32", (rows, columns), name, transpose=True)
            self._replace(node, "FusedMatMul", [node.inputs[0], self._initializer(stored, group)], {"transB": 1})
        else:
            stored = self._store(group, value, "F32", (columns, rows), name)
            node.replace_input_with(1, self._initializer(stored, group))

    def _replace(
        self, node: ir.Node, op_type: str, inputs: list[ir.Value | None], attributes: dict[str, int]
    ) -> None:
        old = node.outputs[0]
        new = ir.node(op_type, inputs, attributes, domain=_CONTRIB, name=node.name)
        out = new.outputs[0]
        out.name, out.shape, out.type = old.name, old.shape, old.type
        self.graph.insert_after(node, new)
        old.replace_all_uses_with(out, replace_graph_outputs=True)
        old.name = f"{old.name}.replaced"
        self.owners[new] = self.owners.get(node, set())
        self.graph.remove(node, safe=True)


def build_skeleton(folder: Path, layers: int) -> tuple[ir.Model, Any]:
    """Ask mobius for the graph of the model whose config.json lies in `folder`, without weights.

    Returns the model (every layer's output named `hidden_states.k`) and the mobius module, whose
    `preprocess_weights` renames the checkpoint's tensors. Raises ModelError for an unknown architecture.
    """
    import mobius
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(folder))
    family = config.model_type
    if family not in mobius.registry:
        raise ModelError(f"Models of the architecture {family!r} are not supported by the graph builder.")
    made: list[Any] = []

    class Recorded(mobius.registry.get(family)):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            made.append(self)

    try:
        package = mobius.build(
            str(folder),
            dtype="f32",
            load_weights=False,
            execution_provider="cpu",
            output_layer_indices=list(range(layers)),
            module_class=Recorded,
        )
    except (ValueError, KeyError, TypeError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"The graph builder can't build models of the architecture {family!r}: {error}") from error
    if "model" not in package or not made:
        raise ModelError(f"Models of the architecture {family!r} are not decoder-only language models.")
    return package["model"], made[0]


def plan_graph(model: ir.Model, *, family: str, layers: int, context: int, precision: Precision) -> Plan:
    """Turn a skeleton into the weightless graph of one variant. Changes `model`.

    Args:
      family: transformers model_type, for messages.
      context: rotary tables are cut to this many positions.
    """
    import onnx_ir.passes.common as passes

    graph = model.graph
    planner = _Planner(graph, family, layers, precision)
    planner.run()
    passes.RemoveUnusedNodesPass()(model)
    for value in list(graph.initializers.values()):
        if value.const_value is None:
            raise ModelError(
                f"Models of the architecture {family!r} can't be published: nothing is known about the "
                f"weight {value.name}."
            )
        if _ROTARY.search(value.name or "") and value.shape[0] > context:
            _truncate(value, context)
    for group in planner.groups.values():
        group.tensors.sort(key=lambda t: t.name)
    for value, group, name in planner.external:
        file = planner.groups["embed" if planner.tied and group == "head" else group]
        stored = next(t for t in file.tensors if t.name == name)
        value.const_value = ir.ExternalTensor(
            group, file.offsets()[name], stored.size, value.dtype, shape=value.shape, name=value.name
        )
        graph.register_initializer(value)
    if planner.tied:
        del planner.groups["head"]
    graph.name = "model"  # the builder puts the path of the checkpoint here
    graph.opset_imports[_CONTRIB] = 1
    model.producer_name, model.producer_version = "meshnode", None
    return Plan(
        graph=ir.to_proto(model).SerializeToString(deterministic=True),
        groups=planner.groups,
        tied=planner.tied,
        recipes=planner.recipes,
    )


def _truncate(value: ir.Value, context: int) -> None:
    table = np.ascontiguousarray(value.const_value.numpy()[:context])
    value.const_value = ir.tensor(table, name=value.name)
    value.shape = ir.Shape(table.shape)
