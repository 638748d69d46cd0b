"""Canonical CBOR for wire messages: a frozen dataclass is a map with small integer keys, strict both ways.

Rules (RFC 8949 section 4.2.1, core deterministic encoding): shortest integers, definite lengths, sorted
keys, no duplicates, nothing after the item, no floats. `decode` re-encodes what it read and compares, so
one message has exactly one encoding. Unknown keys: even is refused, odd is ignored, so a later revision
can add optional fields without a new protocol id.

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
from io import BytesIO
from typing import Any, Final, Generic, TypeVar, cast

import cbor2

from protocols.errors import LocalProtocolError, RemoteProtocolError

T = TypeVar("T")

MAX_DEPTH: Final = 12  # nesting of arrays and maps in one message; ours need 6
_INT_HIGH: Final = (1 << 63) - 1
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
      limit: most characters of a str, bytes of a bytes, or items of a tuple (required for those).
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
    if len(set(keys)) != len(keys) or 0 in keys:
        raise LocalProtocolError(f"{cls.__name__} declares a wire key twice or uses key 0")
    _FIELDS[cls] = tuple(out)
    return _FIELDS[cls]


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
        if f.many and len(value) > 4096:
            raise _Wrong(f"an item of {owner}.{f.name} has a length of {len(value)}, the limit is 4096")


def _to_wire(message: Any, tagged: bool) -> dict[int, Any]:
    cls = type(message)
    out: dict[int, Any] = {0: _TAGS[cls]} if tagged else {}
    for f in _fields(cls):
        value = getattr(message, f.name)
        if f.has_default and value == f.default:
            continue
        if value is None:
            if not f.optional:
                raise _Wrong(f"{cls.__name__}.{f.name} is missing")
            continue
        if f.many:
            if f.limit is not None and len(value) > f.limit:
                raise _Wrong(f"{cls.__name__}.{f.name} has {len(value)} items, the limit is {f.limit}")
            for item in value:
                _check(f, item, cls.__name__)
            plain = f.kind in (int, bool, str, bytes)
            out[f.key] = list(value) if plain else [_to_wire(item, tagged=False) for item in value]
        else:
            _check(f, value, cls.__name__)
            plain = f.kind in (int, bool, str, bytes)
            out[f.key] = value if plain else _to_wire(value, tagged=False)
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
        plain = f.kind in (int, bool, str, bytes)
        if f.many:
            if not isinstance(value, list):
                raise _Wrong(f"{cls.__name__}.{f.name} is a {type(value).__name__}, not an array")
            if f.limit is not None and len(value) > f.limit:
                raise _Wrong(f"{cls.__name__}.{f.name} has {len(value)} items, the limit is {f.limit}")
            items = value if plain else [_from_wire(f.kind, item, tagged=False) for item in value]
            for item in items:
                _check(f, item, cls.__name__)
            value = tuple(items)
        else:
            value = value if plain else _from_wire(f.kind, value, tagged=False)
            _check(f, value, cls.__name__)
        if f.has_default and value == f.default:
            raise _Wrong(f"{cls.__name__}.{f.name} spells out its default, which is left off the wire")
        values[f.name] = value
    for key in rest:
        if not isinstance(key, int) or isinstance(key, bool):
            raise _Wrong(f"{cls.__name__} has the key {key!r}; keys are integers")
        if key % 2 == 0:
            raise _Wrong(f"{cls.__name__} has the unknown even key {key}; this peer speaks a newer protocol")
    return cls(**values)


def _depth_ok(item: Any, left: int = MAX_DEPTH) -> bool:
    if isinstance(item, dict):
        return left > 0 and all(_depth_ok(v, left - 1) for v in item.values())
    if isinstance(item, list):
        return left > 0 and all(_depth_ok(v, left - 1) for v in item)
    return True


def dumps(item: Any) -> bytes:
    """Encode plain data canonically (no dataclasses)."""
    return cbor2.dumps(item, canonical=True)


def loads(data: bytes | memoryview) -> Any:
    """Decode one canonical CBOR item that fills `data` exactly.

    Raises:
      RemoteProtocolError: truncated, trailing bytes, not canonical, floats, tags, or nested too deep.
    """
    stream = BytesIO(data)
    try:
        item = cbor2.CBORDecoder(stream).decode()
        if stream.tell() != len(data) and stream.read(1):
            raise RemoteProtocolError(f"{len(data)} bytes were sent, but the message ends before")
        if not _depth_ok(item):
            raise RemoteProtocolError(f"a message is nested deeper than {MAX_DEPTH} levels")
        again = cbor2.dumps(item, canonical=True)
    except RemoteProtocolError:
        raise
    except (cbor2.CBORError, ValueError, TypeError, RecursionError, OverflowError, MemoryError) as error:
        raise RemoteProtocolError(f"not a canonical CBOR message: {error}") from error
    if again != bytes(data):
        raise RemoteProtocolError("a message is not in canonical CBOR (it decodes, but encodes differently)")
    return item


def encode(message: object) -> bytes:
    """Encode one message of a known class, without tag.

    Raises:
      LocalProtocolError: a field breaks its declared limit.
    """
    try:
        return dumps(_to_wire(message, tagged=False))
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
        """Encode with tag. Raises LocalProtocolError when a limit is broken."""
        try:
            data = dumps(_to_wire(message, tagged=True))
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
        cls = self._classes.get(cast(int, raw.get(0)))
        if cls is None or isinstance(raw.get(0), bool):
            raise RemoteProtocolError(f"{self.name} has no message with the tag {raw.get(0)!r}")
        try:
            return _from_wire(cls, raw, tagged=True)
        except ValueError as wrong:
            raise RemoteProtocolError(str(wrong)) from None
