"""Strategies and attacks for anything that the codec carries: any valid message of a class, any damage to bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from hypothesis import strategies as st

from protocols.codec import _fields
from protocols.errors import RemoteProtocolError

T = TypeVar("T")

_MOST = 4  # items of a tuple, characters and bytes: enough to tell an empty, a single and a longer one


def messages(cls: type[T]) -> st.SearchStrategy[T]:
    """Every valid message of a class, with few and short items."""
    return st.builds(cls, **{f.name: _values(f) for f in _fields(cls)})


def _values(f: Any) -> st.SearchStrategy[Any]:
    most = _MOST if f.limit is None or f.many else min(f.limit, _MOST)
    item: st.SearchStrategy[Any]
    if f.kind is bool:
        item = st.booleans()
    elif f.kind is int:
        item = st.integers(f.low, f.high)
    elif f.kind is str:
        item = st.text(st.characters(exclude_categories=["Cs"]), max_size=most)
    elif f.kind is bytes:
        item = st.binary(min_size=f.size or 0, max_size=most if f.size is None else f.size)
    else:
        item = messages(f.kind)
    if f.many:
        item = st.lists(item, max_size=min(f.limit, _MOST)).map(tuple)
    if f.has_default and f.default is not None:
        item = st.just(f.default) | item
    elif f.optional or f.has_default:
        item = st.none() | item
    return item


def damaged(data: bytes) -> Iterator[bytes]:
    """Every truncation, every flipped bit, one byte too many at either end."""
    yield from (data[:end] for end in range(len(data)))
    for i in range(len(data)):
        for bit in range(8):
            yield data[:i] + bytes((data[i] ^ 1 << bit,)) + data[i + 1 :]
    yield data + b"\0"
    yield b"\0" + data


def survives(data: bytes, decode: Callable[[bytes], Any], encode: Callable[[Any], bytes]) -> bool:
    """Whether bytes from outside are a message. They must be refused properly, or be its one and only encoding.

    A message with ignored (odd, unknown) keys loses them when it is encoded again, so it may come out shorter.
    """
    try:
        message = decode(data)
    except RemoteProtocolError as error:
        assert len(str(error)) < 1000
        return False
    again = encode(message)
    assert again == data or (len(again) < len(data) and decode(again) == message)
    return True


def plain(value: Any) -> Any:
    """A message as JSON: bytes in hex, the class under "type"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value
