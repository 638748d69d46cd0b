"""Blocks of dag-cbor, strict both ways: what a manifest, a frame and their like are made of.

Maps with text keys, arrays, text, bytes, integers, booleans, null and links (CBOR tag 42); canonical, so that one
content has one CID (IPLD specifications, dag-cbor). No floats. A reader checks what it got with the functions below,
which raise `Wrong`; the border of its format turns that into the error of whoever is to blame.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO
from typing import Any, Final

import cbor2

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import Cid, cid_from_bytes, cid_to_bytes

MAX_DEPTH: Final = 8  # nesting of maps and arrays; ours need 5

_LINK: Final = 42  # the CBOR tag of a CID in dag-cbor


class Wrong(ValueError):
    """A value that a block can't have."""


def dumps(item: Any) -> bytes:
    """The canonical bytes of plain values and links."""
    return cbor2.dumps(item, canonical=True)


def loads(data: bytes, what: str) -> Any:
    """The plain values in `data`; `what` names the block in refusals ("a manifest").

    The caller limits the size first.

    Raises:
      Wrong: not dag-cbor, not in its canonical form, or of values that we never write.
    """
    stream = BytesIO(data)
    try:
        item = cbor2.CBORDecoder(stream).decode()
        if stream.tell() != len(data) and stream.read(1):
            raise Wrong(f"bytes follow after the end of {what}")
        _plain_only(item, what, MAX_DEPTH)
        again = dumps(item)
    except Wrong:
        raise
    except (cbor2.CBORError, ValueError, TypeError, RecursionError, OverflowError, MemoryError) as error:
        raise Wrong(f"{what} is not dag-cbor: {error}") from error
    if again != data:
        raise Wrong(f"{what} is not in canonical dag-cbor (it decodes, but encodes differently)")
    return item


def _plain_only(item: Any, what: str, left: int) -> None:
    """Raise `Wrong` for anything that dag-cbor or our blocks do not know."""
    if left < 0:
        raise Wrong(f"{what} is nested deeper than {MAX_DEPTH} levels")
    if isinstance(item, dict):
        for key, value in item.items():
            if not isinstance(key, str):
                raise Wrong(f"a map of {what} has the key {str(key)[:40]!r}; keys are text")
            _plain_only(value, what, left - 1)
    elif isinstance(item, list):
        for value in item:
            _plain_only(value, what, left - 1)
    elif isinstance(item, cbor2.CBORTag):
        if item.tag != _LINK or not isinstance(item.value, bytes):
            raise Wrong(f"{what} has the CBOR tag {item.tag}; only links (42) are allowed")
    elif item is not None and not isinstance(item, (str, bytes, int)):
        raise Wrong(f"{what} has a value of the type {type(item).__name__}")


def written(work: Callable[[], bytes], what: str, limit: int) -> bytes:
    """What `work` gives; a `Wrong` inside of it is our own fault here.

    Raises:
      LocalProtocolError: a value is wrong, or there are more than `limit` bytes.
    """
    name = what[0].upper() + what[1:]
    try:
        data = work()
    except Wrong as wrong:
        raise LocalProtocolError(f"{name} can't be written: {wrong}.") from None
    if len(data) > limit:
        raise LocalProtocolError(f"{name} of {len(data)} bytes can't be written; the limit is {limit}.")
    return data


def a_map(value: Any, what: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """A map with exactly these keys. Raises `Wrong`."""
    if not isinstance(value, dict):
        raise Wrong(f"{what} is a {type(value).__name__}, not a map")
    if set(value) != set(keys):
        odd = sorted(str(k) for k in set(value) ^ set(keys))
        raise Wrong(f"{what} lacks or has too much: {', '.join(odd)[:120]}")
    return value


def an_int(value: Any, what: str, low: int, high: int) -> int:
    """Raises `Wrong` unless it is an integer from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Wrong(f"{what} is {str(value)[:40]}, allowed are {low} to {high}")
    return value


def a_text(value: Any, what: str, pattern: re.Pattern[str]) -> str:
    """Raises `Wrong` unless it is a text of this form."""
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise Wrong(f"{what} is {str(value)[:80]!r}, which does not fit the form {pattern.pattern}")
    return value


def link_to_wire(cid: str) -> cbor2.CBORTag:
    """A CID as the link that other IPLD tools follow. Raises `Wrong`."""
    try:
        return cbor2.CBORTag(_LINK, b"\x00" + cid_to_bytes(cid))
    except RemoteProtocolError as error:
        raise Wrong(str(error)) from None


def link_from_wire(value: Any, what: str) -> Cid:
    """The CID behind a link. Raises `Wrong`."""
    if not isinstance(value, cbor2.CBORTag) or value.tag != _LINK or value.value[:1] != b"\x00":
        raise Wrong(f"{what} is not a link")
    try:
        return cid_from_bytes(value.value[1:])
    except RemoteProtocolError as error:
        raise Wrong(f"{what}: {error}") from None
