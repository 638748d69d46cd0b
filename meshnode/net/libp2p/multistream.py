"""multistream-select 1.0: agree on a stream's protocol (github.com/multiformats/multistream-select).

A peer answers `na` both for what it does not serve and for whom it does not admit. An opener that wants to know
which then asks for `ADMITTED`, a protocol that exists for nothing else and is agreed on with members only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from meshnode.core.errors import PeerUnreachable
from meshnode.net.port import Stream
from protocols.errors import RemoteProtocolError

HEADER: Final = "/multistream/1.0.0"
NOT_AVAILABLE: Final = "na"
ADMITTED: Final = "/meshnode/admitted/1"
MAX_LINE: Final = 1024
MAX_PROPOSALS: Final = 16


async def propose(stream: Stream, protocols: tuple[str, ...]) -> str:
    """As the opener: the first of `protocols` that the peer agrees to, "" for none.

    The first proposal travels together with the header, so that agreement costs one round trip.

    Raises:
      PeerUnreachable: the stream broke or ended.
      RemoteProtocolError: the peer speaks something else.
    """
    await stream.send_all(_line(HEADER) + _line(protocols[0]))
    answer = await _read_line(stream)
    if answer != HEADER:
        raise RemoteProtocolError(f"{stream.peer} opened its answer with {answer[:80]!r}, not with {HEADER}")
    for number, protocol in enumerate(protocols):
        if number:
            await stream.send_all(_line(protocol))
        answer = await _read_line(stream)
        if answer == protocol:
            return protocol
        if answer != NOT_AVAILABLE:
            raise RemoteProtocolError(f"{stream.peer} answered {answer[:80]!r} to a proposal of {protocol}")
    return ""


class Accepted(Stream, Protocol):
    """A stream that a peer opened."""

    @property
    def unread(self) -> int:
        """Bytes that `receive_some` gives without waiting."""


async def agree(stream: Accepted, serves: Callable[[str], bool]) -> str:
    """As the accepter: the protocol agreed on, "" when the peer gives up.

    Every opener sends its header first, most with a proposal right behind it; to those, header and agreement go in
    one piece. go-bitswap opens a stream for every single message.

    Raises as `propose` does; RemoteProtocolError also after `MAX_PROPOSALS`.
    """
    if (line := await _read_line(stream)) != HEADER:
        raise RemoteProtocolError(f"{stream.peer} opened a stream with {line[:80]!r}, not with {HEADER}")
    answer = _line(HEADER)
    for _ in range(MAX_PROPOSALS):
        if answer and not stream.unread:
            await stream.send_all(answer)
            answer = b""
        protocol = await _read_line(stream, end_allowed=True)
        if not protocol:
            return ""
        if serves(protocol):
            await stream.send_all(answer + _line(protocol))
            return protocol
        answer += _line(NOT_AVAILABLE)
    await stream.send_all(answer)
    raise RemoteProtocolError(
        f"{stream.peer} proposed {MAX_PROPOSALS} protocols on one stream; we serve none of them"
    )


def _line(text: str) -> bytes:
    data = text.encode() + b"\n"
    length = len(data)
    prefix = bytes((length,)) if length < 128 else bytes((length & 127 | 128, length >> 7))
    return prefix + data


def _cut_off(stream: Stream) -> PeerUnreachable:
    return PeerUnreachable(f"{stream.peer} closed a stream before its protocol was agreed on", peer=stream.peer)


async def _read_line(stream: Stream, *, end_allowed: bool = False) -> str:
    length = shift = 0
    while True:
        byte = await stream.receive_some(1)
        if not byte:
            if end_allowed and not shift:
                return ""
            raise _cut_off(stream)
        length |= (byte[0] & 127) << shift
        shift += 7
        if byte[0] < 128:
            break
        if shift > 14:
            raise RemoteProtocolError(f"{stream.peer} sent a protocol name with a length of more than 14 bits")
    if not 0 < length <= MAX_LINE:
        raise RemoteProtocolError(f"{stream.peer} sent a protocol name of {length} bytes; {MAX_LINE} is the limit")
    line = b""
    while len(line) < length:
        piece = await stream.receive_some(length - len(line))
        if not piece:
            raise _cut_off(stream)
        line += piece
    if not line.endswith(b"\n"):
        raise RemoteProtocolError(f"{stream.peer} sent a protocol name that does not end its line")
    return line[:-1].decode("utf-8", "replace")
