"""Canonical CBOR for wire messages: a frozen dataclass is a map with small integer keys, strict both ways.

Rules (RFC 8949 section 4.2.1, core deterministic encoding): shortest integers, definite lengths, sorted
keys, no duplicates, nothing after the item; no floats, no tags. One message has exactly one encoding. The
reader is our own: it refuses anything else byte by byte, before a declared length has cost memory, where a
general decoder would build dates, regular expressions and cycles from tags. Unknown keys: even is refused,
odd is ignored, so a later revision can add optional fields without a new protocol id.

A message class is declared so:

    @message(tag=3)
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Step:
        session: bytes = at(1, size=16)      # exactly 16 bytes
        position: int = at(2, high=1 << 20)  # tokens
        reason: str = at(3, limit=500, default="")

Key 0 carries the tag when the class is part of a `Union`. Field types: int, bool, str, bytes, another
message class, `X | None`, `tuple[X, ...]`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, TypeVar

import cbor2

from protocols.errors import LocalProtocolError, RemoteProtocolError

T = TypeVar("T")

MAX_DEPTH: Final = 12  # nesting of arrays and maps in one message; ours need 6
MAX_ITEM: Final = 4096  # length of one str or bytes inside a tuple
_INT_HIGH: Final = (1 << 63) - 1
_SHOWN: Final = 60  # characters of the peer's own words in an error
_SIMPLE: Final[dict[int, bool | None]] = {20: False, 21: True, 22: None}
_SHORTEST: Final = {24: 24, 25: 1 << 8, 26: 1 << 16, 27: 1 << 32}  # smallest number that needs this width
_TAGS: dict[type, int] = {}


def at(
    key: int,
    *,
    low: int = 0,
    high: int = _INT_HIGH,
    limit: int | None = None,
    size: int | None = None,
    default: Any = dataclasses.MISSING,
) -> Any:
    """Declare a field: its wire key and its limits.

    Args:
      key: integer map key, 1 or more; 0 is the tag.
      low, high: inclusive range of an int.
      limit: most characters of a str, bytes of a bytes, or items of a tuple; required for those, unless
        `size` is given. An item of a tuple has at most `MAX_ITEM` characters or bytes.
      size: exact number of bytes of a bytes field.
      default: value that is left off the wire; such a field may be missing.
    """
    meta = {"key": key, "low": low, "high": high, "limit": limit, "size": size}
    return dataclasses.field(default=default, metadata=meta)


def message(tag: int) -> Callable[[type[T]], type[T]]:
    """Mark a dataclass as a message with this tag (its number inside a `Union`)."""

    def mark(cls: type[T]) -> type[T]:
        _TAGS[cls] = tag
        return cls

    return mark


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    name: str
    key: int
    kind: Any  # int, bool, str, bytes, or a message class
    plain: bool  # not a message class
    many: bool
    optional: bool
    has_default: bool
    default: Any
    low: int
    high: int
    limit: int | None
    size: int | None


_FIELDS: dict[type, tuple[_Field, ...]] = {}


def _fields(cls: type) -> tuple[_Field, ...]:
    known = _FIELDS.get(cls)
    if known is not None:
        return known
    hints = typing.get_type_hints(cls)
    out = []
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        optional = many = False
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            optional = True
            (kind,) = (a for a in typing.get_args(kind) if a is not type(None))
        if typing.get_origin(kind) is tuple:
            many = True
            kind = typing.get_args(kind)[0]
        kind = getattr(kind, "__supertype__", kind)  # NewType
        meta = f.metadata
        out.append(
            _Field(
                name=f.name,
                key=meta["key"],
                kind=kind,
                plain=kind in (int, bool, str, bytes),
                many=many,
                optional=optional,
                has_default=f.default is not dataclasses.MISSING,
                default=f.default,
                low=meta["low"],
                high=meta["high"],
                limit=meta["limit"],
                size=meta["size"],
            )
        )
    keys = [f.key for f in out]
    if len(set(keys)) != len(keys) or min(keys, default=1) < 1:
        raise LocalProtocolError(f"{cls.__name__} declares a wire key twice, or one below 1")
    for known_field in out:
        _check_declaration(cls, known_field)
    _FIELDS[cls] = tuple(sorted(out, key=lambda f: f.key))  # the order of the wire
    return _FIELDS[cls]


def _check_declaration(cls: type, f: _Field) -> None:
    if not f.plain and not dataclasses.is_dataclass(f.kind):
        raise LocalProtocolError(f"{cls.__name__}.{f.name} has a type that is not for messages: {f.kind}")
    if f.limit is None and (f.many or (f.kind in (str, bytes) and f.size is None)):
        raise LocalProtocolError(f"{cls.__name__}.{f.name} declares no limit")


class _Wrong(ValueError):
    """A value breaks the declaration of its field; the border decides whose fault it is."""


def _check(f: _Field, value: Any, owner: str) -> None:
    """Raise `_Wrong` unless `value` (one item of the field) is of the declared kind and within limits."""
    if f.kind is bool:
        ok = isinstance(value, bool)
    elif f.kind is int:
        ok = isinstance(value, int) and not isinstance(value, bool)
        if ok and not f.low <= value <= f.high:
            raise _Wrong(f"{owner}.{f.name} is {value}, allowed are {f.low} to {f.high}")
    else:
        ok = isinstance(value, f.kind)
    if not ok:
        raise _Wrong(f"{owner}.{f.name} is a {type(value).__name__}, not a {f.kind.__name__}")
    if f.kind in (str, bytes):
        if f.size is not None and len(value) != f.size:
            raise _Wrong(f"{owner}.{f.name} has {len(value)} bytes instead of {f.size}")
        if f.limit is not None and not f.many and len(value) > f.limit:
            raise _Wrong(f"{owner}.{f.name} has a length of {len(value)}, the limit is {f.limit}")
        if f.many and len(value) > MAX_ITEM:
            raise _Wrong(f"an item of {owner}.{f.name} has a length of {len(value)}, the limit is {MAX_ITEM}")


def _to_wire(message: Any, tagged: bool) -> dict[int, Any]:
    cls = type(message)
    out: dict[int, Any] = {0: _TAGS[cls]} if tagged else {}
    for f in _fields(cls):
        value = getattr(message, f.name)
        if value is None:
            if not (f.optional or (f.has_default and f.default is None)):
                raise _Wrong(f"{cls.__name__}.{f.name} is missing")
            if f.has_default and f.default is not None:
                raise _Wrong(f"{cls.__name__}.{f.name} is None, which the wire can't tell from its default")
            continue
        if f.many:
            if not isinstance(value, tuple):
                raise _Wrong(f"{cls.__name__}.{f.name} is a {type(value).__name__}, not a tuple")
            if f.limit is not None and len(value) > f.limit:
                raise _Wrong(f"{cls.__name__}.{f.name} has {len(value)} items, the limit is {f.limit}")
            for item in value:
                _check(f, item, cls.__name__)
        else:
            _check(f, value, cls.__name__)
        if f.has_default and value == f.default:
            continue
        if f.plain:
            out[f.key] = list(value) if f.many else value
        elif f.many:
            out[f.key] = [_to_wire(item, tagged=False) for item in value]
        else:
            out[f.key] = _to_wire(value, tagged=False)
    return out


def _from_wire(cls: type[T], raw: Any, tagged: bool) -> T:
    if not isinstance(raw, dict):
        raise _Wrong(f"{cls.__name__} is a {type(raw).__name__}, not a map")
    rest = dict(raw)
    if tagged:
        rest.pop(0, None)
    values: dict[str, Any] = {}
    for f in _fields(cls):
        if f.key not in rest:
            if f.has_default:
                values[f.name] = f.default
            elif f.optional:
                values[f.name] = None
            else:
                raise _Wrong(f"{cls.__name__}.{f.name} (key {f.key}) is missing")
            continue
        value = rest.pop(f.key)
        if f.many:
            if not isinstance(value, list):
                raise _Wrong(f"{cls.__name__}.{f.name} is a {type(value).__name__}, not an array")
            if f.limit is not None and len(value) > f.limit:
                raise _Wrong(f"{cls.__name__}.{f.name} has {len(value)} items, the limit is {f.limit}")
            items = value if f.plain else [_from_wire(f.kind, item, tagged=False) for item in value]
            for item in items:
                _check(f, item, cls.__name__)
            value = tuple(items)
        else:
            value = value if f.plain else _from_wire(f.kind, value, tagged=False)
            _check(f, value, cls.__name__)
        if f.has_default and value == f.default:
            raise _Wrong(f"{cls.__name__}.{f.name} spells out its default, which is left off the wire")
        values[f.name] = value
    for key in rest:
        if isinstance(key, str):
            raise _Wrong(f"{cls.__name__} has the key {key[:_SHOWN]!r}; keys are integers")
        if key % 2 == 0:
            raise _Wrong(f"{cls.__name__} has the unknown even key {key}; this peer speaks a newer protocol")
    return cls(**values)


def _read(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    """The item that starts at `at`, and where it ends. Raises _Wrong, or IndexError where the data ends."""
    first = data[at]
    major, info = first >> 5, first & 31
    at += 1
    if major == 7:
        if info not in _SIMPLE:
            raise _Wrong(f"byte {first:#04x} is no part of a message (no floats, no undefined values)")
        return _SIMPLE[info], at
    if major == 6 or info > 27:
        raise _Wrong(f"byte {first:#04x} is no part of a message (no tags, no indefinite lengths)")
    if info < 24:
        number = info
    else:
        width = 1 << (info - 24)
        number = int.from_bytes(data[at : at + width], "big")
        at += width
        if at > len(data):
            raise IndexError
        if number < _SHORTEST[info]:
            raise _Wrong(f"the number {number} is spelt in {width} bytes, which is not its shortest form")
    if major == 0:
        return number, at
    if major == 1:
        return -1 - number, at
    if major in (2, 3):
        end = at + number
        if end > len(data):
            raise IndexError
        return (data[at:end] if major == 2 else data[at:end].decode("utf-8")), end
    if depth == 0:
        raise _Wrong(f"it is nested deeper than {MAX_DEPTH} levels")
    if number > len(data) - at:  # an item has at least one byte, so this can't be complete
        raise IndexError
    if major == 4:
        items = []
        for _ in range(number):
            item, at = _read(data, at, depth - 1)
            items.append(item)
        return items, at
    pairs: dict[int | str, Any] = {}
    before = b""
    for _ in range(number):
        if data[at] >> 5 not in (0, 3):
            raise _Wrong("a key of a map is neither a number from 0 nor a text")
        key, end = _read(data, at, 0)
        spelling = data[at:end]
        if spelling <= before:
            raise _Wrong(f"the key {str(key)[:_SHOWN]!r} comes twice or out of order")
        pairs[key], at = _read(data, end, depth - 1)
        before = spelling
    return pairs, at


def dumps(item: Any) -> bytes:
    """Encode plain data canonically (no dataclasses). Keys of one map are numbers from 0, or texts.

    Raises:
      LocalProtocolError: it holds something that has no encoding, such as a text with half a surrogate pair.
    """
    return _dump(item, canonical=True)


def _dump(item: Any, *, canonical: bool) -> bytes:
    # Sorting costs more than the rest; `_to_wire` gives maps that are in order already.
    try:
        return cbor2.dumps(item, canonical=canonical)
    except (cbor2.CBORError, ValueError, TypeError, RecursionError) as error:
        raise LocalProtocolError(f"a message can't be encoded: {error}") from error


def loads(data: bytes | memoryview) -> Any:
    """Decode one canonical CBOR item that fills `data` exactly: int, bool, None, str, bytes, list, dict.

    Raises:
      RemoteProtocolError: truncated, trailing bytes, not canonical, floats, tags, or nested too deep.
    """
    raw = bytes(data)
    try:
        item, end = _read(raw, 0, MAX_DEPTH)
    except IndexError:
        raise RemoteProtocolError(f"a message of {len(raw)} bytes is cut off") from None
    except ValueError as wrong:
        raise RemoteProtocolError(f"not a canonical CBOR message: {wrong}") from None
    if end != len(raw):
        raise RemoteProtocolError(f"a message ends after {end} bytes, but {len(raw)} were sent")
    return item


def encode(message: object) -> bytes:
    """Encode one message of a known class, without tag.

    Raises:
      LocalProtocolError: a field breaks its declared limit.
    """
    try:
        return _dump(_to_wire(message, tagged=False), canonical=False)
    except _Wrong as wrong:
        raise LocalProtocolError(str(wrong)) from None


def decode(cls: type[T], data: bytes | memoryview) -> T:
    """Decode one message of a known class.

    Raises:
      RemoteProtocolError: not canonical, a missing or unknown field, a limit broken.
    """
    try:
        return _from_wire(cls, loads(data), tagged=False)
    except ValueError as wrong:
        raise RemoteProtocolError(str(wrong)) from None


class Union(Generic[T]):
    """A closed set of message classes that share a stream, told apart by their tag under key 0."""

    def __init__(self, name: str, *classes: type[T], limit: int) -> None:
        self.name = name
        self.limit = limit  # bytes of one encoded message
        self._classes = {_TAGS[c]: c for c in classes}
        if len(self._classes) != len(classes):
            raise LocalProtocolError(f"two messages of {name} share a tag")

    def __iter__(self) -> Iterator[type[T]]:
        return iter(self._classes.values())

    def encode(self, message: T) -> bytes:
        """Encode with tag. Raises LocalProtocolError when a limit is broken, or for a foreign class."""
        if self._classes.get(_TAGS.get(type(message), -1)) is not type(message):
            raise LocalProtocolError(f"{type(message).__name__} is no message of {self.name}")
        try:
            data = _dump(_to_wire(message, tagged=True), canonical=False)
        except _Wrong as wrong:
            raise LocalProtocolError(str(wrong)) from None
        if len(data) > self.limit:
            raise LocalProtocolError(f"a {type(message).__name__} of {len(data)} bytes; limit {self.limit}")
        return data

    def decode(self, data: bytes | memoryview) -> T:
        """Decode by tag. Raises RemoteProtocolError for anything that is not exactly such a message."""
        if len(data) > self.limit:
            raise RemoteProtocolError(f"a message of {self.name} has {len(data)} bytes; limit {self.limit}")
        raw = loads(data)
        if not isinstance(raw, dict):
            raise RemoteProtocolError(f"a message of {self.name} is not a map")
        tag = raw.get(0)
        cls = self._classes.get(tag) if type(tag) is int else None
        if cls is None:
            raise RemoteProtocolError(f"{self.name} has no message with the tag {str(tag)[:_SHOWN]!r}")
        try:
            return _from_wire(cls, raw, tagged=True)
        except ValueError as wrong:
            raise RemoteProtocolError(str(wrong)) from None
