"""Whether a graph may be run: it computes, within bounds, on the weights of its release, and does nothing else.

A graph comes from whoever published the model, and ONNX Runtime does what it says, with files too: a tensor may name
one by its path or even an address in memory. So every operator and attribute must be listed (`operators.py`), and a
tensor is either in the graph, its bytes as many as its shape says, or a range of a group file of the release. The
encoding was looked at before (`graph_wire.py`): there are no graphs inside of graphs, no functions, no sparse
tensors.

The models that are cut from a graph are checked again; a tensor in them that is not inline has no place at all, since
the engine hands its bytes over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod
from typing import Any, Final

import onnx

from meshnode.engine.graph_wire import Refused, quoted
from meshnode.engine.operators import OPERATORS, VERSIONS
from meshnode.engine.rotary import LOCATION as ROTARY

MAX_NODES: Final = 1 << 18
MAX_TENSORS: Final = 1 << 18
MAX_VALUES: Final = 1 << 14  # inputs, outputs and described values
MAX_ENDS: Final = 1024  # inputs or outputs of one node: all experts of a layer are joined by one
MAX_RANK: Final = 8
MAX_SIZE: Final = 1 << 31  # of one dimension
MAX_CONSTANT_BYTES: Final = 1 << 16  # of a tensor inside a node
MAX_INLINE_BYTES: Final = 1 << 25  # of a tensor beside the nodes: a rotary table that can't be computed
MAX_WORD: Final = 64  # characters of an attribute that is text
IR_VERSIONS: Final = range(3, 14)

HANDED_OVER: Final = "given"  # location of a tensor in a cut model: the engine has its bytes
_GROUP: Final = re.compile(r"embed|head|layer\.(0|[1-9][0-9]{0,3})")
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,15}")

_TENSOR, _ATTRIBUTE = onnx.TensorProto, onnx.AttributeProto
# bytes of an element, and which list may hold elements that are not in raw_data
_TYPES: Final[dict[int, tuple[int, str]]] = {
    _TENSOR.FLOAT: (4, "float_data"),
    _TENSOR.UINT8: (1, "int32_data"),
    _TENSOR.INT8: (1, "int32_data"),
    _TENSOR.INT32: (4, "int32_data"),
    _TENSOR.INT64: (8, "int64_data"),
    _TENSOR.BOOL: (1, "int32_data"),
    _TENSOR.FLOAT16: (2, "int32_data"),
    _TENSOR.BFLOAT16: (2, "int32_data"),
}
_LISTS: Final = ("float_data", "int32_data", "int64_data")
# type of an attribute: its number, and the field that holds it
_KINDS: Final[dict[str, tuple[int, str]]] = {
    "float": (_ATTRIBUTE.FLOAT, "f"),
    "int": (_ATTRIBUTE.INT, "i"),
    "string": (_ATTRIBUTE.STRING, "s"),
    "tensor": (_ATTRIBUTE.TENSOR, "t"),
    "floats": (_ATTRIBUTE.FLOATS, "floats"),
    "ints": (_ATTRIBUTE.INTS, "ints"),
}


def check_graph(model: onnx.ModelProto, *, cut: bool = False) -> None:
    """Raises Refused, with a part of a sentence that says which node or tensor breaks which rule.

    Args:
      cut: a model that was cut for the engine; else the graph of a release.
    """
    _check_versions(model)
    graph = model.graph
    _check_count("nodes", graph.node, MAX_NODES)
    _check_count("initializers", graph.initializer, MAX_TENSORS)
    values = (*graph.input, *graph.output, *graph.value_info)
    _check_count("described values", values, MAX_VALUES)
    for tensor in graph.initializer:
        _check_initializer(tensor, cut=cut)
    for node in graph.node:
        _check_node(node)
    for value in values:
        _check_value(value)
    # with a name that stands for two things, who reads first decides
    weights = {t.name for t in graph.initializer}
    names = [t.name for t in graph.initializer]
    names += [v.name for v in graph.input if v.name not in weights]
    names += [name for node in graph.node for name in node.output if name]
    _check_once("value", names)
    for kind, list_ in (("input", graph.input), ("output", graph.output), ("described value", graph.value_info)):
        _check_once(kind, [v.name for v in list_])


def _check_versions(model: onnx.ModelProto) -> None:
    if model.ir_version not in IR_VERSIONS:
        raise Refused(f"it is of ONNX IR version {model.ir_version}; {_span(IR_VERSIONS)} are known")
    _check_once("operator set", [_domain(entry.domain) for entry in model.opset_import])
    for entry in model.opset_import:
        known = VERSIONS.get(_domain(entry.domain))
        if known is None:
            raise Refused(f"it wants the operator set {quoted(entry.domain)}, which is not one of ours")
        if entry.version not in known:
            raise Refused(
                f"it wants version {entry.version} of the operator set {quoted(entry.domain)}, "
                f"of which {_span(known)} are known"
            )


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name  # two names of one


def _span(numbers: range) -> str:
    return f"{numbers[0]} to {numbers[-1]}"


def _check_count(what: str, items: Any, most: int) -> None:
    if len(items) > most:
        raise Refused(f"it has {len(items)} {what}, {most} are allowed")


def _check_once(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise Refused(f"the {what} {quoted(name)} is there twice")
        seen.add(name)


# ---------------------------------------------------------------- nodes


def _check_node(node: onnx.NodeProto) -> None:
    domain, operator = _domain(node.domain), node.op_type
    known = OPERATORS.get(domain, {}).get(operator)
    label = f"the node {quoted(node.name or next(iter(node.output), ''))}"
    shown = quoted(f"{domain}.{operator}" if domain else operator)
    if known is None:
        raise Refused(f"{label} is {shown}, which is not among the operators that a model may use")
    if max(len(node.input), len(node.output)) > MAX_ENDS:
        raise Refused(f"{label} has more than {MAX_ENDS} inputs or outputs")
    try:
        _check_once("attribute", [a.name for a in node.attribute])
        for attribute in node.attribute:
            _check_attribute(attribute, known)
    except Refused as error:
        raise Refused(f"{label} ({shown}): {error}") from None


def _check_attribute(attribute: onnx.AttributeProto, known: Any) -> None:
    name = quoted(attribute.name)
    if attribute.name not in known:
        raise Refused(f"the attribute {name} is not among those that it may have")
    number, holder = _KINDS[known[attribute.name]]
    if attribute.type != number:
        raise Refused(f"the attribute {name} is not of the type {known[attribute.name]}")
    for _, field in _KINDS.values():
        if field != holder and _is_set(attribute, field):
            raise Refused(f"the attribute {name} has two values")
    if holder == "t":
        if attribute.t.data_location == _TENSOR.EXTERNAL or attribute.t.external_data:
            raise Refused(f"the attribute {name} is a tensor in a file; only initializers may be")
        _check_inline(attribute.t, MAX_CONSTANT_BYTES)
    if holder == "s" and not (len(attribute.s) <= MAX_WORD and attribute.s.isascii()):
        raise Refused(f"the attribute {name} is no word of at most {MAX_WORD} characters")


def _is_set(attribute: onnx.AttributeProto, field: str) -> bool:
    value = getattr(attribute, field)
    return bool(attribute.HasField("t")) if field == "t" else bool(value)


# ---------------------------------------------------------------- tensors and values


def _check_initializer(tensor: onnx.TensorProto, *, cut: bool) -> None:
    if not tensor.name:
        raise Refused("an initializer has no name")
    try:
        if tensor.data_location != _TENSOR.EXTERNAL:
            _check_inline(tensor, MAX_INLINE_BYTES)
        elif cut:
            if _place(tensor) != {"location": HANDED_OVER}:
                raise Refused("it is in a file, and a cut model has none")
            _check_shape(tensor)
        else:
            _check_external(tensor)
    except Refused as error:
        raise Refused(f"the initializer {quoted(tensor.name)}: {error}") from None


def _check_inline(tensor: onnx.TensorProto, most: int) -> None:
    """A tensor whose elements are in the graph, as many as its shape says."""
    if tensor.data_location != _TENSOR.DEFAULT or tensor.external_data or tensor.metadata_props:
        raise Refused("it says that it is here and elsewhere")
    count, (size, list_) = _check_shape(tensor), _TYPES[tensor.data_type]
    if count * size > most:
        raise Refused(f"it has {count * size} bytes inside the graph, {most} are allowed")
    if any(len(getattr(tensor, other)) for other in _LISTS if other != list_):
        raise Refused("its elements are of another type than it says")
    elements = len(getattr(tensor, list_))
    if elements and tensor.raw_data:
        raise Refused("it has its elements twice")
    if (elements or not tensor.raw_data) and elements != count:
        raise Refused(f"it has {elements} elements, its shape says {count}")
    if tensor.raw_data and len(tensor.raw_data) != count * size:
        raise Refused(f"it has {len(tensor.raw_data)} bytes, its shape says {count * size}")


def _check_external(tensor: onnx.TensorProto) -> None:
    """A tensor that is a range of a group file of the release, or a rotary table that is computed (`rotary.py`)."""
    count, (size, _) = _check_shape(tensor), _TYPES[tensor.data_type]
    if tensor.raw_data or any(len(getattr(tensor, list_)) for list_ in _LISTS):
        raise Refused("it says that it is here and elsewhere")
    place = _place(tensor)
    location = place.get("location", "")
    if location == ROTARY:
        if len(place) > 1:
            raise Refused("a rotary table has no place in a file")
        return
    if not _GROUP.fullmatch(location):
        raise Refused(f"it is in {quoted(location)}, which is no group of layers of the release")
    if place.keys() != {"location", "offset", "length"} or tensor.metadata_props:
        raise Refused("its place must be a location, an offset and a length, and nothing else")
    if not (_NUMBER.fullmatch(place["offset"]) and _NUMBER.fullmatch(place["length"])):
        raise Refused("the offset or the length of its place is no number")
    if int(place["length"]) != count * size:
        raise Refused(f"its place has {place['length']} bytes, its shape says {count * size}")


def _place(tensor: onnx.TensorProto) -> dict[str, str]:
    _check_once("key of its place", [entry.key for entry in tensor.external_data])
    return {entry.key: entry.value for entry in tensor.external_data}


def _check_shape(tensor: onnx.TensorProto) -> int:
    """How many elements it has."""
    if tensor.data_type not in _TYPES:
        raise Refused(f"it is of the data type {tensor.data_type}, which no model needs")
    if len(tensor.dims) > MAX_RANK:
        raise Refused(f"it has {len(tensor.dims)} dimensions, {MAX_RANK} are allowed")
    if not all(0 <= size <= MAX_SIZE for size in tensor.dims):
        raise Refused(f"a dimension of its shape is not between 0 and {MAX_SIZE}")
    return prod(tensor.dims)


def _check_value(value: onnx.ValueInfoProto) -> None:
    label = f"the value {quoted(value.name)}"
    if not value.type.HasField("tensor_type") or value.type.tensor_type.elem_type not in _TYPES:
        raise Refused(f"{label} is of a type that no model needs")
    dimensions = value.type.tensor_type.shape.dim
    if len(dimensions) > MAX_RANK or not all(0 <= d.dim_value <= MAX_SIZE for d in dimensions):
        raise Refused(f"{label} has a shape of more than {MAX_RANK} dimensions, or one that is too large")
