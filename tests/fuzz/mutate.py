"""How inputs are injured: bytes, what CBOR and JSON hold, and messages of any class that the codec carries."""

from __future__ import annotations

import json
import random
from typing import Any, Final, TypeVar

import cbor2

from protocols.codec import _fields

T = TypeVar("T")

MAX_INPUT: Final = 1 << 18  # bytes; a longer one is cut
_BYTES: Final = (0, 1, 2, 8, 10, 0x18, 0x1B, 0x2A, 0x32, 0x3A, 0x5B, 0x7F, 0x80, 0x9B, 0xA0, 0xC0, 0xD8, 0xFF)
_PIECES: Final = (  # lengths and numbers at the edges, and what opens something without closing it
    *(
        n.to_bytes(width, order)
        for width in (2, 4, 8)
        for order in ("big", "little")
        for n in (0, 1, (1 << 8 * width) - 1)
    ),
    *((1 << 31).to_bytes(8, order) for order in ("big", "little")),
    *((1 << 63).to_bytes(8, order) for order in ("big", "little")),
    b"\xff" * 10,
    b"\x80" * 9 + b"\x01",
    b"\x9f",
    b"\xfb\x7f\xf8\0\0\0\0\0\0",
    b"NaN",
    b"1e999",
    b"-1",
    b"null",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"&#1114112;",
    b"\x1b[2J",
    b"/../",
    b'"""',
    "\u200b\u0130ß".encode(),
)
_LONG: Final = (
    b"9",
    b"[",
    b"{",
    b'{"a":',
    b"(",
    b"\x81",
    b"\xa1\0",
    b"&#9",
    b"\0",
    b"\xff",
    b"a.",
    b"<",
    b" a",
    b"\t\0\0\0\1" + bytes(7),
)
_VALUES: Final = (
    None, True, False, 0, 1, -1, 23, 24, 255, 1 << 16, 1 << 31, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
    -(1 << 63), "", "a", "\0", "\x1b[2J", "../../etc", "ß" * 40, "9" * 60, b"", b"\0" * 16, b"\xff" * 32, [], {},
    [[]], {0: 0},
)  # fmt: skip


def injured(data: bytes, chance: random.Random) -> bytes:
    """The bytes after one to six injuries."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(out) + 1)
        end = min(len(out), at + chance.randint(0, 30))
        match chance.randrange(9):
            case 0 | 1 if at < len(out):
                out[at] ^= 1 << chance.randrange(8)
            case 2:
                del out[at:end]
            case 3:
                out[at:at] = out[at:end] * chance.randint(1, 20)
            case 4:
                out[at:end] = chance.randbytes(chance.randint(0, 12))
            case 5:
                piece = out[at:end]
                del out[at:end]
                place = chance.randrange(len(out) + 1)
                out[place:place] = piece
            case 6:
                piece = chance.choice(_PIECES)
                out[at : at + (len(piece) if chance.random() < 0.5 else 0)] = piece
            case 7:
                if chance.random() < 0.04:
                    out[at:at] = chance.choice((b"", b"", b"&#", b" = ", b"/tcp/")) + chance.choice(
                        _LONG
                    ) * chance.choice((100, 100, 1200, 1200, 5000, 20_000))
                elif chance.random() < 0.1:
                    del out[at:]
            case _ if at < len(out):
                out[at] = chance.choice(_BYTES)
    return bytes(out[:MAX_INPUT])


def spliced(one: bytes, other: bytes, chance: random.Random) -> bytes:
    """The beginning of one input and the end of another."""
    return one[: chance.randrange(len(one) + 1)] + other[chance.randrange(len(other) + 1) :]


def odd(item: Any, chance: random.Random, values: tuple[Any, ...] = _VALUES) -> Any:
    """Plain data in which one place holds something else; keys of maps are left as they are."""
    if isinstance(item, dict) and item and chance.random() < 0.85:
        key = chance.choice(list(item))
        if chance.random() < 0.1:
            return {k: v for k, v in item.items() if k != key}
        return {**item, key: odd(item[key], chance, values)}
    if isinstance(item, list) and item and chance.random() < 0.8:
        at = chance.randrange(len(item))
        match chance.randrange(10):
            case 0:
                return [*item[:at], *item[at + 1 :]]
            case 1:
                return [*item[:at], *[item[at]] * chance.randint(2, 40), *item[at + 1 :]]
        return [*item[:at], odd(item[at], chance, values), *item[at + 1 :]]
    if isinstance(item, int) and not isinstance(item, bool) and chance.random() < 0.5:
        return item + chance.choice((-1, 1, 1 << 20, -item))
    if isinstance(item, (str, bytes)) and item and chance.random() < 0.5:
        at = chance.randrange(len(item))
        return item[:at] + item[at + 1 :] if chance.random() < 0.5 else item * chance.choice((2, 30))
    if chance.random() < 0.02:
        deep: Any = item
        for _ in range(chance.choice((13, 40, 90))):
            deep = [deep]
        return deep
    return chance.choice(values)


def odd_cbor(data: bytes, chance: random.Random) -> bytes:
    """Canonical CBOR with another value somewhere; what is no CBOR comes out injured byte by byte."""
    try:
        return cbor2.dumps(odd(cbor2.loads(data), chance), canonical=True)
    except (cbor2.CBORError, ValueError, TypeError, RecursionError, OverflowError):
        return injured(data, chance)


def odd_json(data: bytes, chance: random.Random) -> bytes:
    """JSON with another value somewhere; what is no JSON comes out injured byte by byte."""
    try:
        changed = odd(
            json.loads(data), chance, (*(v for v in _VALUES if not isinstance(v, bytes)), 1.5, float("nan"))
        )
        return json.dumps(changed).encode()
    except (ValueError, TypeError, RecursionError):
        return injured(data, chance)


def message_of(cls: type[T], chance: random.Random) -> T:
    """Any valid message of a class, with few and short items."""
    return cls(**{f.name: _value(f, chance) for f in _fields(cls)})


def _value(f: Any, chance: random.Random) -> Any:
    if f.has_default and chance.random() < 0.3:
        return f.default
    if f.optional and chance.random() < 0.3:
        return None
    if f.many:
        return tuple(_item(f, chance) for _ in range(chance.randint(0, min(f.limit, 4))))
    return _item(f, chance)


def _item(f: Any, chance: random.Random) -> Any:
    if f.kind is bool:
        return chance.random() < 0.5
    if f.kind is int:
        return chance.choice((f.low, f.high, chance.randint(f.low, f.high), min(f.high, f.low + chance.randrange(9))))
    most = 4 if f.limit is None or f.many else min(f.limit, 4)
    if f.kind is str:
        return "".join(chance.choice("ab.-/1é\0") for _ in range(chance.randint(0, most)))
    if f.kind is bytes:
        return chance.randbytes(f.size if f.size is not None else chance.randint(0, most))
    return message_of(f.kind, chance)
