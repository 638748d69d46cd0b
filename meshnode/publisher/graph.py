"""The weightless graph of a whole model, and which weights of which group it wants.

    hidden_states.k is the output of layer k. Between two of them lies exactly one layer, so any cut
    [a, b) is: inputs hidden_states.{a-1} (or input_ids), outputs hidden_states.{b-1} (or logits).

`plan_graph` takes a graph with every layer boundary as an output (so that no fusion reaches across one and every cut
gives the same numbers; `skeleton.py`), replaces each matrix by one initializer that points into a group
file, and swaps the operators of quantised variants. Constant arithmetic on weights (packing Q, K and V into one
matrix, transposing) becomes a recipe that is carried out when the group file is written. Rotary tables become
placeholders of a few hundred bytes (`engine/rotary.py`).

Runs in the publisher only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir

from meshnode.core.errors import ModelError
from meshnode.engine.graph_file import pack_graph
from meshnode.engine.rotary import Rotary
from meshnode.publisher.calibrate import UNKNOWN, Importance
from meshnode.publisher.expression import Array, Expression, Joined, Reader, Transposed, Weight, joint_name
from meshnode.publisher.groups import Group, Stored
from meshnode.publisher.precision import BLOCK, Packing, Precision
from meshnode.publisher.quantise import Packed, packed_shapes, quantise

_SOURCE: Final = "checkpoint:"  # the builder's initializers, so that ours can have the plain names
_CONTRIB: Final = "com.microsoft"
_GATHER: Final = "GatherBlockQuantized"
_PRODUCT: Final = "MatMulNBits"
# onnxruntime takes how many of a head's columns are turned from the width of the table, and refuses to be told
_UNKNOWN_ATTRIBUTE: Final = ("GroupQueryAttention", "rotary_embedding_dim")
_SHARED_INPUTS: Final = frozenset(("attention_mask", "position_ids"))


@dataclass(slots=True)
class Plan:
    """What `plan_graph` found: a graph and the content of every group file."""

    graph: bytes  # content of the graph file
    groups: dict[str, Group]  # "layer.0", ..., and the ends
    tied: bool  # embedding and head are one file, named "embed"
    recipes: dict[str, Recipe] = field(default_factory=dict)  # by name of the stored tensor

    def read(self, name: str, weights: Reader, importance: Importance = UNKNOWN) -> Array:
        """Compute one stored tensor from the checkpoint's weights."""
        return self.recipes[name].read(weights, importance)

    def forget(self) -> None:
        """Let go of the matrix that was quantised last."""
        for recipe in self.recipes.values():
            recipe.shared.clear()


@dataclass(slots=True)
class Recipe:
    """How a stored tensor comes out of the checkpoint: a constant expression, then quantisation."""

    value: Expression
    part: str = "plain"  # or "data", "scales", "zero_points" of the quantised matrix
    packing: Packing | None = None
    shared: dict[Expression, Packed] = field(default_factory=dict)  # kept until the last part of a matrix is read

    def read(self, weights: Reader, importance: Importance) -> Array:
        if self.packing is None:
            return self.value.evaluate(weights)
        if self.value not in self.shared:
            self.shared.clear()
            matters = importance.of(self.value.sources())
            self.shared[self.value] = quantise(self.value.evaluate(weights), self.packing, matters)
        return np.asarray(getattr(self.shared[self.value], self.part))


# ---------------------------------------------------------------- constant expressions


def _expression(value: ir.Value | None) -> Expression | None:
    """What a value computes from weights alone; None when anything else enters."""
    if value is None:
        return None
    if value.is_initializer():
        if value.const_value is not None:
            return None
        name = (value.name or "").removeprefix(_SOURCE)
        return Weight(name, tuple(int(d) for d in value.shape))
    node = value.producer()
    if node is None or node.op_type not in ("Concat", "Transpose", "Identity"):
        return None
    inner = [_expression(i) for i in node.inputs]
    parts = tuple(e for e in inner if e is not None)
    if not parts or len(parts) != len(inner):
        return None
    if node.op_type == "Concat":
        return Joined(node.attributes["axis"].as_int(), parts)
    if node.op_type == "Transpose" and len(parts[0].shape) == 2:
        return Transposed(parts[0])
    return parts[0] if node.op_type == "Identity" else None


def _flipped(expression: Expression) -> Expression:
    """The transposed matrix, without transposing twice."""
    return expression.inner if isinstance(expression, Transposed) else Transposed(expression)


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
                f"to the output of layer {k}."
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
        self.shared: dict[Expression, Packed] = {}
        self.external: dict[tuple[str, str], ir.Value] = {}  # (group, stored tensor) -> initializer
        for value in list(graph.initializers.values()):
            if value.const_value is None:
                value.name = _SOURCE + (value.name or "")
        self.tied = self._is_tied()

    def run(self) -> None:
        for node in list(self.graph):
            if any(_expression(o) for o in node.outputs):
                continue  # part of an expression: goes away with the last use of it
            found = [(i, e) for i, v in enumerate(node.inputs) if (e := _expression(v)) is not None]
            if not found:
                continue
            index, first = found[0]
            if node.op_type == "Gather" and index == 0 and len(first.shape) == 2:
                self._table(node, first)
            elif node.op_type == "MatMul" and index == 1 and len(first.shape) == 2:
                self._matrix(node, first, self._group(node))
            else:
                for index, expression in found:
                    node.replace_input_with(index, self._plain(self._group(node), expression))

    def _group(self, node: ir.Node) -> str:
        """The group whose stage runs this node."""
        owners = self.owners.get(node, set())
        if len(owners) != 1:
            raise ModelError(
                f"Models of the architecture {self.family!r} can't be cut into layers: {node.name} uses a weight "
                "that several layers share."
            )
        (owner,) = owners
        reads_ids = any(i is not None and i.name == "input_ids" for i in node.inputs)
        return "embed" if node.op_type == "Gather" and reads_ids else owner

    def _is_tied(self) -> bool:
        """Whether the head's matrix is the embedding table."""
        tables = [_expression(n.inputs[0]) for n in self.graph if n.op_type == "Gather"]
        heads = [
            _flipped(e)
            for n in self.graph
            if n.op_type == "MatMul" and self.owners.get(n) == {"head"} and (e := _expression(n.inputs[1]))
        ]
        return any(t is not None and t in heads for t in tables)

    def _file(self, group: str) -> Group:
        return self.groups["embed" if self.tied and group == "head" else group]

    def _plain(self, group: str, expression: Expression) -> ir.Value:
        """Store a weight as it is, in float32."""
        stored = Stored(joint_name(expression), "F32", expression.shape)
        return self._store(group, stored, Recipe(expression))

    def _packed(self, group: str, matrix: Expression, packing: Packing, *, table: bool = False) -> list[ir.Value]:
        """Store a matrix [N, K] quantised: data, scales and, if the packing has them, zero points.

        `table`: GatherBlockQuantized wants the packed bytes of a row in one dimension.
        """
        rows, columns = matrix.shape
        name = joint_name(matrix)
        parts = (("data", "U8"), ("scales", "F32"), ("zero_points", "U8"))
        out = []
        for (part, dtype), shape in zip(parts, packed_shapes(rows, columns, packing), strict=False):
            recipe = Recipe(matrix, part, packing, self.shared)
            view = (rows, shape[1] * shape[2]) if table and part == "data" else shape
            out.append(self._store(group, Stored(f"{name}.{part}", dtype, shape), recipe, view))
        return out

    def _store(self, group: str, stored: Stored, recipe: Recipe, view: tuple[int, ...] | None = None) -> ir.Value:
        """Put a tensor into the file of `group`; gives a graph initializer over its bytes in the shape `view`."""
        self._file(group).add(stored)
        self.recipes[stored.name] = recipe
        known = self.external.get((group, stored.name))
        if known is not None:
            return known
        taken = any(name == stored.name for _, name in self.external)
        kind = ir.DataType.FLOAT if stored.dtype == "F32" else ir.DataType.UINT8
        value = ir.Value(
            name=f"{group}:{stored.name}" if taken else stored.name,
            shape=ir.Shape(view or stored.shape),
            type=ir.TensorType(kind),
        )
        self.external[group, stored.name] = value
        return value

    def _table(self, node: ir.Node, table: Expression) -> None:
        """The embedding: Gather, or GatherBlockQuantized over the packed bytes."""
        group = self._group(node)
        packing = self._packing(table)
        if packing is None:
            node.replace_input_with(0, self._plain(group, table))
            return
        if table.shape[1] % BLOCK:
            raise ModelError(
                f"The hidden size {table.shape[1]} of this model is not a multiple of {BLOCK}, so its embedding "
                "can't be quantised. Publish the variant fp32."
            )
        data, *rest = self._packed(group, table, packing, table=True)
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": packing.bits}
        self._replace(node, [ir.node(_GATHER, [data, node.inputs[1], *rest], attributes, domain=_CONTRIB)])

    def _matrix(self, node: ir.Node, expression: Expression, group: str) -> None:
        """A matrix [inputs, outputs] of a layer or the head."""
        matrix = _flipped(expression)
        pieces = self._pieces(matrix)
        packing = self._packing(pieces[0])
        if packing is None and group == "head" and self.tied:  # the table's own bytes, multiplied as they lie
            inputs = [node.inputs[0], self._plain(group, matrix)]
            self._replace(node, [ir.node("FusedMatMul", inputs, {"transB": 1}, domain=_CONTRIB)])
        elif packing is None:
            node.replace_input_with(1, self._plain(group, expression))
        else:
            products = [self._product(node, piece, group) for piece in pieces]
            if len(products) > 1:
                joined = [p.outputs[0] for p in products]
                products.append(ir.node("Concat", joined, {"axis": -1}))
            self._replace(node, products)

    def _pieces(self, matrix: Expression) -> list[Expression]:
        """The neighbouring parts of a packed matrix that are stored alike: Q with K, and V where it is finer."""
        if not isinstance(matrix, Joined) or matrix.axis != 0:
            return [matrix]
        runs: list[list[Expression]] = []
        for part in matrix.parts:
            alike = runs and self._packing(runs[-1][0]) == self._packing(part)
            if alike:
                runs[-1].append(part)
            else:
                runs.append([part])
        if len(runs) == 1:
            return [matrix]
        return [run[0] if len(run) == 1 else Joined(0, tuple(run)) for run in runs]

    def _packing(self, expression: Expression) -> Packing | None:
        return self.precision.packing_of(joint_name(expression))

    def _product(self, node: ir.Node, matrix: Expression, group: str) -> ir.Node:
        """MatMulNBits with one piece of the matrix of `node`."""
        rows, columns = matrix.shape
        packing = self._packing(matrix)
        assert packing is not None
        attributes = {"K": columns, "N": rows, "bits": packing.bits, "block_size": BLOCK, "accuracy_level": 4}
        inputs = [node.inputs[0], *self._packed(group, matrix, packing)]
        product = ir.node(_PRODUCT, inputs, attributes, domain=_CONTRIB, name=joint_name(matrix))
        product.outputs[0].name = f"{joint_name(matrix)}.product"
        return product

    def _replace(self, node: ir.Node, replacement: list[ir.Node]) -> None:
        """Put `replacement` in the place of a node; its last output takes over the name and the uses."""
        old, out = node.outputs[0], replacement[-1].outputs[0]
        out.name, out.shape, out.type = old.name, old.shape, old.type
        replacement[-1].name = node.name
        self.graph.insert_after(node, replacement)
        old.replace_all_uses_with(out, replace_graph_outputs=True)
        old.name = f"{old.name}.replaced"
        self.graph.remove(node, safe=True)


def kept_heads(model: ir.Model) -> tuple[int, int]:
    """How many heads of how many values a graph keeps of each token and layer. Raises ModelError when they differ."""
    found = {
        (int(i.shape[1]), int(i.shape[3]))
        for i in model.graph.inputs
        if (i.name or "").startswith("past_key_values.") and i.shape is not None
    }
    if len(found) != 1:
        raise ModelError("The layers of this model keep heads of different sizes, which is not supported.")
    return found.pop()


def plan_graph(
    model: ir.Model,
    *,
    family: str,
    layers: int,
    precision: Precision,
    rotary: Mapping[str, Rotary],
) -> Plan:
    """Turn a skeleton into the weightless graph of one variant. Changes `model`.

    Args:
      family: transformers model_type, for messages.
      rotary: tables that can be computed, by initializer; they become placeholders.
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
                f"weight {(value.name or '').removeprefix(_SOURCE)}."
            )
    for group in planner.groups.values():
        group.tensors.sort(key=lambda t: t.name)
    for (location, name), value in planner.external.items():
        file = planner.groups["embed" if planner.tied and location == "head" else location]
        size = next(t.size for t in file.tensors if t.name == name)
        value.const_value = ir.ExternalTensor(
            location, file.offsets()[name], size, value.dtype, shape=value.shape, name=value.name
        )
        graph.register_initializer(value)
    if planner.tied:
        del planner.groups["head"]
    graph.name = "model"  # the builder puts the path of the checkpoint here
    graph.opset_imports[_CONTRIB] = 1
    model.producer_name, model.producer_version = "meshnode", None
    proto = ir.to_proto(model)
    del proto.functions[:]  # the builder's words for operators that onnxruntime has; an engine refuses them
    _slim(proto.graph, rotary)
    return Plan(
        graph=pack_graph(proto),
        groups=planner.groups,
        tied=planner.tied,
        recipes=planner.recipes,
    )


def _slim(graph: onnx.GraphProto, rotary: Mapping[str, Rotary]) -> None:
    """Leave out what nobody needs to open the graph, and the rotary tables that can be computed."""
    del graph.value_info[:]  # onnxruntime infers it again; the borders of layers are described as outputs
    for node in graph.node:
        del node.metadata_props[:]  # where the builder's Python code made it
        kept = [a for a in node.attribute if (node.op_type, a.name) != _UNKNOWN_ATTRIBUTE]
        if len(kept) < len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(kept)
    for tensor in graph.initializer:
        if tensor.name in rotary:
            tensor.CopyFrom(rotary[tensor.name].placeholder(tensor.name))
