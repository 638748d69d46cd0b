"""The part of DNS messages that discovery needs (RFC 1035 section 4, RFC 6762): one question, or names and texts.

Read from whoever shares the network, so everything is bounded and nothing but RemoteProtocolError is raised.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from protocols.errors import RemoteProtocolError

MAX_PACKET: Final = 1472  # bytes: one Ethernet frame; longer ones of others are none of our business
MAX_RECORDS: Final = 32  # of one packet that are looked at
MAX_NAME: Final = 255  # bytes (RFC 1035, section 2.3.4)
MAX_LABEL: Final = 63
MAX_JUMPS: Final = 8  # compression pointers in one name
MAX_STRING: Final = 255  # bytes of one string of a TXT record

PTR, TXT, ANY = 12, 16, 255
IN: Final = 1
FLUSH: Final = 0x8000  # of a class: this record replaces earlier ones (RFC 6762, section 10.2)
RESPONSE: Final = 0x8400  # flags: an answer, with authority (section 18)

_HEADER: Final = struct.Struct(">6H")
_QUESTION: Final = struct.Struct(">2H")
_RECORD: Final = struct.Struct(">2HIH")


@dataclass(frozen=True, slots=True)
class Packet:
    """What of a packet matters here. Names are lower case, without the last dot."""

    questions: tuple[tuple[str, int], ...] = ()  # (name, type)
    pointers: tuple[tuple[str, str], ...] = ()  # PTR: (name, where it points)
    texts: tuple[tuple[str, tuple[bytes, ...]], ...] = ()  # TXT: (name, strings)


def query(name: str) -> bytes:
    """Who is at this name (PTR)?"""
    return _HEADER.pack(0, 0, 1, 0, 0, 0) + _name(name) + _QUESTION.pack(PTR, IN)


def response(service: str, instance: str, strings: tuple[bytes, ...], ttl_s: int) -> bytes:
    """`instance` is at `service`, and says these strings."""
    target = _name(instance)
    text = b"".join(bytes((len(string),)) + string for string in strings)
    return b"".join(
        (
            _HEADER.pack(0, RESPONSE, 0, 1, 0, 1),
            _name(service) + _RECORD.pack(PTR, IN, ttl_s, len(target)) + target,
            target + _RECORD.pack(TXT, IN | FLUSH, ttl_s, len(text)) + text,
        )
    )


def parse(data: bytes) -> Packet:
    """Raises RemoteProtocolError: too long, cut off, or with a name that leads nowhere."""
    if len(data) > MAX_PACKET:
        raise RemoteProtocolError(f"a DNS packet of {len(data)} bytes; {MAX_PACKET} is the limit")
    try:
        return _parse(data)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise RemoteProtocolError("a DNS packet that is cut off or garbled") from error


def _parse(data: bytes) -> Packet:
    _, _, asked, *records = _HEADER.unpack_from(data)
    if asked + sum(records) > MAX_RECORDS:
        raise RemoteProtocolError(f"a DNS packet of {asked + sum(records)} records; {MAX_RECORDS} is the limit")
    at = _HEADER.size
    questions = []
    for _ in range(asked):
        name, at = _read_name(data, at)
        kind, _ = _QUESTION.unpack_from(data, at)
        at += _QUESTION.size
        questions.append((name, kind))
    pointers, texts = [], []
    for _ in range(sum(records)):
        name, at = _read_name(data, at)
        kind, _, _, length = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        if at + length > len(data):
            raise RemoteProtocolError("a DNS record that is longer than its packet")
        if kind == PTR:
            pointers.append((name, _read_name(data, at)[0]))
        elif kind == TXT:
            texts.append((name, _read_strings(data[at : at + length])))
        at += length
    return Packet(tuple(questions), tuple(pointers), tuple(texts))


def _name(name: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode("ascii") for label in name.split(".")) + b"\x00"


def _read_name(data: bytes, at: int) -> tuple[str, int]:
    """A name, and where the bytes behind it begin."""
    labels: list[str] = []
    size, jumps, end = 0, 0, -1
    while length := data[at]:
        if length & 0xC0 == 0xC0:
            target = (length & 0x3F) << 8 | data[at + 1]
            end = at + 2 if end < 0 else end
            jumps += 1
            if target >= at or jumps > MAX_JUMPS:  # only backwards, so that it comes to an end
                raise RemoteProtocolError("a DNS name whose pointers lead nowhere")
            at = target
            continue
        if length > MAX_LABEL:
            raise RemoteProtocolError("a DNS label of an unknown kind")
        size += length + 1
        if size > MAX_NAME or at + 1 + length > len(data):
            raise RemoteProtocolError("a DNS name that is too long or cut off")
        labels.append(data[at + 1 : at + 1 + length].decode("utf-8").lower())
        at += 1 + length
    return ".".join(labels), at + 1 if end < 0 else end


def _read_strings(data: bytes) -> tuple[bytes, ...]:
    strings, at = [], 0
    while at < len(data):
        end = at + 1 + data[at]
        if end > len(data):
            raise RemoteProtocolError("a DNS text that is cut off")
        strings.append(data[at + 1 : end])
        at = end
    return tuple(strings)
