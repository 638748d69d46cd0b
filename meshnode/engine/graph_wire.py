"""The bytes of a graph, looked at before a protobuf library reads them.

A few bytes can stand for a message, so 64 MiB could become gigabytes of objects, and a field that one library skips
is read by another. This scanner walks the encoding (protobuf.dev/programming-guides/encoding) with a list of the
fields of onnx.proto that a graph of ours may have. It refuses what is not on the list, what is malformed, and more
fields than `MAX_FIELDS`; it takes a microsecond a field, builds nothing, and goes as deep as the list does.

What is not listed cannot be in a graph: graphs inside of attributes, sparse tensors, functions, training, sequences,
strings as tensors, metadata but that of a rotary table.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

MAX_FIELDS: Final = 1 << 22  # a model of 48 layers with 128 experts each has 2 million
MAX_WORDS: Final = 4096  # bytes of a name or a description
MAX_NUMBERS: Final = 1 << 16  # bytes of a list of numbers
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES: Final = 10
_SHOWN: Final = 80  # characters of a name

# message -> field -> (name, what it holds): "int", "fixed", "words", "ints", "fixeds", "data", or a message
_MESSAGES: Final[dict[str, dict[int, tuple[str, str]]]] = {
    "ModelProto": {
        1: ("ir_version", "int"),
        2: ("producer_name", "words"),
        3: ("producer_version", "words"),
        4: ("domain", "words"),
        5: ("model_version", "int"),
        6: ("doc_string", "words"),
        7: ("graph", "GraphProto"),
        8: ("opset_import", "OperatorSetIdProto"),
    },
    "OperatorSetIdProto": {1: ("domain", "words"), 2: ("version", "int")},
    "GraphProto": {
        1: ("node", "NodeProto"),
        2: ("name", "words"),
        5: ("initializer", "TensorProto"),
        10: ("doc_string", "words"),
        11: ("input", "ValueInfoProto"),
        12: ("output", "ValueInfoProto"),
        13: ("value_info", "ValueInfoProto"),
    },
    "NodeProto": {
        1: ("input", "words"),
        2: ("output", "words"),
        3: ("name", "words"),
        4: ("op_type", "words"),
        5: ("attribute", "AttributeProto"),
        6: ("doc_string", "words"),
        7: ("domain", "words"),
    },
    "AttributeProto": {
        1: ("name", "words"),
        2: ("f", "fixed"),
        3: ("i", "int"),
        4: ("s", "words"),
        5: ("t", "TensorProto"),
        7: ("floats", "fixeds"),
        8: ("ints", "ints"),
        13: ("doc_string", "words"),
        20: ("type", "int"),
    },
    "TensorProto": {
        1: ("dims", "ints"),
        2: ("data_type", "int"),
        4: ("float_data", "fixeds"),
        5: ("int32_data", "ints"),
        7: ("int64_data", "ints"),
        8: ("name", "words"),
        9: ("raw_data", "data"),
        12: ("doc_string", "words"),
        13: ("external_data", "StringStringEntryProto"),
        14: ("data_location", "int"),
        16: ("metadata_props", "StringStringEntryProto"),
    },
    "StringStringEntryProto": {1: ("key", "words"), 2: ("value", "long words")},
    "ValueInfoProto": {1: ("name", "words"), 2: ("type", "TypeProto"), 3: ("doc_string", "words")},
    "TypeProto": {1: ("tensor_type", "TypeProto.Tensor"), 6: ("denotation", "words")},
    "TypeProto.Tensor": {1: ("elem_type", "int"), 2: ("shape", "TensorShapeProto")},
    "TensorShapeProto": {1: ("dim", "TensorShapeProto.Dimension")},
    "TensorShapeProto.Dimension": {1: ("dim_value", "int"), 2: ("dim_param", "words"), 3: ("denotation", "words")},
}
# what onnx.proto has besides, for the words of a refusal
_LEFT_OUT: Final[dict[str, dict[int, str]]] = {
    "ModelProto": {14: "metadata_props", 20: "training_info", 25: "functions", 26: "configuration"},
    "GraphProto": {14: "quantization_annotation", 15: "sparse_initializer", 16: "metadata_props"},
    "NodeProto": {8: "overload", 9: "metadata_props", 10: "device_configurations"},
    "AttributeProto": {
        6: "g",
        9: "strings",
        10: "tensors",
        11: "graphs",
        14: "tp",
        15: "type_protos",
        21: "ref_attr_name",
        22: "sparse_tensor",
        23: "sparse_tensors",
    },
    "TensorProto": {3: "segment", 6: "string_data", 10: "double_data", 11: "uint64_data"},
    "ValueInfoProto": {4: "metadata_props"},
    "TypeProto": {4: "sequence_type", 5: "map_type", 7: "opaque_type", 8: "sparse_tensor_type", 9: "optional_type"},
}
_NAMED: Final = {"NodeProto": (3, "node"), "TensorProto": (8, "tensor"), "ValueInfoProto": (1, "value")}
_LIMITS: Final = {"words": MAX_WORDS, "long words": MAX_NUMBERS, "ints": MAX_NUMBERS, "fixeds": MAX_NUMBERS}


class _Kind:
    """A message, by the tags (field number and wire type) that its fields have."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fields = _MESSAGES[name]
        self.leaves: dict[int, int] = {}  # tag -> most bytes; 0: a varint
        self.inner: dict[int, _Kind] = {}
        self.once: set[int] = set()  # tags of messages that occur once

    def link(self, kinds: dict[str, _Kind]) -> None:
        for number, (name, holds) in self.fields.items():
            tag = number << 3
            if holds in kinds:
                self.inner[tag | _BYTES] = kinds[holds]
                if name in _SINGLE:
                    self.once.add(tag | _BYTES)
            elif holds in ("int", "ints"):
                self.leaves[tag | _VARINT] = 0
            elif holds in ("fixed", "fixeds"):
                self.leaves[tag | _FIXED32] = 4
            if holds in ("words", "long words", "ints", "fixeds"):
                self.leaves[tag | _BYTES] = _LIMITS[holds]
            elif holds == "data":
                self.leaves[tag | _BYTES] = 1 << 62  # as many as the file has


_SINGLE: Final = frozenset(("graph", "t", "type", "tensor_type", "shape"))
_KINDS: Final = {name: _Kind(name) for name in _MESSAGES}
for _kind in _KINDS.values():
    _kind.link(_KINDS)


class Refused(ValueError):
    """Why bytes are no graph of ours: a part of a sentence."""

    def __init__(self, text: str, *, damaged: bool = False, named: bool = False) -> None:
        """`damaged`: rather an accident than a purpose; `named`: the text says which node or tensor it is about."""
        super().__init__(text)
        self.damaged = damaged
        self.named = named


def quoted(name: str) -> str:
    """A name out of a graph, for people: short, and no character that a terminal would obey."""
    return repr(name if len(name) <= _SHOWN else f"{name[: _SHOWN - 3]}...")


def scan(content: bytes) -> None:
    """Raises Refused unless every field of a ModelProto is listed above, well formed and within its limit."""
    _Scanner(content).message(_KINDS["ModelProto"], 0, len(content))


class _Scanner:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self._left = MAX_FIELDS

    def message(self, kind: _Kind, at: int, end: int) -> None:
        """The fields of one message at [at, end)."""
        content, leaves, inner = self._content, kind.leaves, kind.inner
        seen: set[int] = set()
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise Refused(f"it has more than {MAX_FIELDS} fields")
            tag = content[at]
            at += 1
            if tag >= 0x80:
                tag, at = self._varint(at - 1, end)
            wire = tag & 7
            if wire == _BYTES:
                if at < end and content[at] < 0x80:
                    size = content[at]
                    at += 1
                else:
                    size, at = self._varint(at, end)
                if size > end - at:
                    raise Refused("it is cut off: a field is longer than what holds it", damaged=True)
                below = inner.get(tag)
                if below is not None:
                    if tag in kind.once:
                        if tag in seen:
                            raise Refused(f"{_field(kind, tag)} occurs twice")
                        seen.add(tag)
                    try:
                        self.message(below, at, at + size)
                    except Refused as error:
                        raise self._named(below, at, at + size, error) from None
                elif size > leaves.get(tag, -1):
                    raise _refusal(kind, tag, size)
                at += size
            elif wire == _VARINT:
                if tag not in leaves:
                    raise _refusal(kind, tag, 0)
                if at < end and content[at] < 0x80:
                    at += 1
                else:
                    _, at = self._varint(at, end)
            elif wire == _FIXED32 and tag in leaves:
                at += 4
                if at > end:
                    raise Refused("it is cut off", damaged=True)
            else:
                raise _refusal(kind, tag, 0)

    def _named(self, kind: _Kind, at: int, end: int, error: Refused) -> Refused:
        """The refusal, with the name of the node or tensor at [at, end) if it has one and the words none yet."""
        if kind.name not in _NAMED or error.named:
            return error
        field, what = _NAMED[kind.name]
        name = b""
        with suppress(Refused):
            while at < end:
                tag, at = self._varint(at, end)
                size = {_FIXED32: 4, _FIXED64: 8}.get(tag & 7, 0)
                if tag & 7 in (_VARINT, _BYTES):
                    size, after = self._varint(at, end)
                    at, size = after, size if tag & 7 == _BYTES else 0
                if tag == field << 3 | _BYTES:
                    name = self._content[at : min(at + size, end)]
                    break
                at += size
        return Refused(
            f"the {what} {quoted(name.decode(errors='replace'))}: {error}", damaged=error.damaged, named=True
        )

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """(value, where it ends)."""
        value = 0
        for index in range(_VARINT_BYTES):
            if at + index >= end:
                raise Refused("it is cut off", damaged=True)
            byte = self._content[at + index]
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                if value >> 64:
                    break
                return value, at + index + 1
        raise Refused("a number has more than 64 bits", damaged=True)


def _field(kind: _Kind, tag: int) -> str:
    number = tag >> 3
    name = kind.fields[number][0] if number in kind.fields else _LEFT_OUT.get(kind.name, {}).get(number)
    return f"{name or f'the unknown field {number}'} of a {kind.name}"


def _refusal(kind: _Kind, tag: int, size: int) -> Refused:
    limit = kind.leaves.get(tag)
    if limit:
        return Refused(f"{_field(kind, tag)} has {size} bytes, {limit} are allowed")
    return Refused(f"{_field(kind, tag)} may not be in a graph (wire type {tag & 7})")
