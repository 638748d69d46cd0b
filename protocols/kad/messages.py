"""The one message of the libp2p Kademlia DHT (libp2p specs, kad-dht), encoded by hand, and its stream framing.

On a stream each message is preceded by its length as a varint. Values (field 3) are neither read nor written:
nothing that a stranger says about a key is stored or believed here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId
from protocols.kad.address import address_bytes, address_of, peer_bytes, peer_of
from protocols.protobuf import as_bytes, as_int, fields, put_field, put_varint, take_varint

PROTOCOL: Final = "/ipfs/kad/1.0.0"  # among public addresses
LAN_PROTOCOL: Final = "/ipfs/lan/kad/1.0.0"  # among private ones (Kubo runs both side by side)
MAX_MESSAGE_BYTES: Final = 1 << 18  # 20 peers with 30 addresses each, and a few hundred providers
MAX_KEY_BYTES: Final = 80  # what Kubo takes
MAX_PEERS: Final = 32  # read of each list, the rest is skipped; Kubo sends 20, the sought peer, all providers
MAX_ADDRESSES: Final = 16  # read of each peer, of those that we can dial

Buffer = bytes | bytearray | memoryview


class Kind(IntEnum):
    PUT_VALUE = 0
    GET_VALUE = 1
    ADD_PROVIDER = 2
    GET_PROVIDERS = 3
    FIND_NODE = 4
    PING = 5


@dataclass(frozen=True, slots=True)
class Peer:
    """Somebody, and where they are said to be."""

    id: PeerId
    addresses: tuple[str, ...] = ()  # like /ip4/192.0.2.1/tcp/4331


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A request or its answer; the kind says which fields mean something."""

    kind: Kind
    key: bytes = b""  # the multihash of a block, or a peer id; at most 80 bytes
    closer: tuple[Peer, ...] = ()  # of those the answerer knows, who is nearest to the key
    providers: tuple[Peer, ...] = ()


def block_key(cid: bytes) -> bytes:
    """What providers of a block are filed under: the multihash of its binary CIDv1, whatever its codec."""
    return cid[2:]


def place(key: bytes) -> int:
    """Where a key, or the bytes of a peer id, lies: a number of 256 bits. XOR of two places is their distance."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big")


def place_of(peer: PeerId) -> int:
    """Where a peer lies. Raises RemoteProtocolError for what is no peer id."""
    return place(peer_bytes(peer))


def _peer(peer: Peer) -> bytes:
    if len(peer.addresses) > MAX_ADDRESSES:
        raise LocalProtocolError(f"a DHT peer with {len(peer.addresses)} addresses; {MAX_ADDRESSES} is the limit")
    return put_field(1, peer_bytes(peer.id)) + b"".join(put_field(2, address_bytes(a)) for a in peer.addresses)


def encode(message: Message) -> bytes:
    """The protobuf message without its length. Raises LocalProtocolError when a limit is broken."""
    if len(message.key) > MAX_KEY_BYTES or max(len(message.closer), len(message.providers)) > MAX_PEERS:
        raise LocalProtocolError(
            f"a DHT message with a key of {len(message.key)} bytes, {len(message.closer)} nearer peers and "
            f"{len(message.providers)} providers is above the limits"
        )
    parts = [put_field(1, int(message.kind))]
    if message.key:
        parts.append(put_field(2, message.key))
    parts += [put_field(8, _peer(peer)) for peer in message.closer]
    parts += [put_field(9, _peer(peer)) for peer in message.providers]
    return b"".join(parts)


def frame(message: Message) -> bytes:
    """A message with its length before it."""
    data = encode(message)
    return put_varint(len(data)) + data


def _decode_peer(view: memoryview) -> Peer | None:
    name, raw = b"", []
    for number, value in fields(view):
        if number == 1:
            name = bytes(as_bytes(number, value)[: MAX_KEY_BYTES + 1])
        elif number == 2:
            raw.append(as_bytes(number, value))
        elif number == 3:
            as_int(number, value)
    peer = peer_of(name)
    if peer is None:
        return None
    addresses: dict[str, None] = {}
    for item in raw:
        address = address_of(bytes(item), peer)
        if address is not None:
            addresses[address] = None
        if len(addresses) == MAX_ADDRESSES:
            break
    return Peer(peer, tuple(addresses))


def decode(data: Buffer) -> Message:
    """Read one message. Unknown fields, values, peers without a proper id and addresses that we can't dial are
    skipped.

    Raises:
      RemoteProtocolError: no protobuf, a wrong wire type, an unknown kind, a key or a message above its limit.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(f"a DHT message of {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    kind, key = 0, b""
    closer: dict[PeerId, Peer] = {}
    providers: dict[PeerId, Peer] = {}
    for number, value in fields(memoryview(data)):
        if number == 1:
            kind = as_int(number, value)
        elif number == 2:
            view = as_bytes(number, value)
            if len(view) > MAX_KEY_BYTES:
                raise RemoteProtocolError(f"a DHT key of {len(view)} bytes; the limit is {MAX_KEY_BYTES}")
            key = bytes(view)
        elif number == 3:
            as_bytes(number, value)
        elif number in (8, 9):
            known = closer if number == 8 else providers
            peer = _decode_peer(as_bytes(number, value)) if len(known) < MAX_PEERS else None
            if peer is not None:
                known.setdefault(peer.id, peer)
    if kind not in Kind.__members__.values():
        raise RemoteProtocolError(f"a DHT message of the kind {kind}, which is not known")
    return Message(kind=Kind(kind), key=key, closer=tuple(closer.values()), providers=tuple(providers.values()))


class MessageReader:
    """Takes bytes as they come, gives whole messages (undecoded). Holds at most one message and one read."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: Buffer) -> Iterator[bytes]:
        """Add bytes, yield every message that is complete.

        Raises:
          RemoteProtocolError: a length of 0, or above the limit (before anything of that size is buffered), or no
            varint.
        """
        self._buffer += data
        while self._buffer:
            head = next((at for at, byte in enumerate(self._buffer[:4], 1) if byte < 0x80), 0)
            if not head:
                if len(self._buffer) >= 4:
                    raise RemoteProtocolError("the length of a DHT message is above every limit")
                return
            length, _ = take_varint(self._buffer, 0, head)
            if not 0 < length <= MAX_MESSAGE_BYTES:  # none is empty, and empty ones could go on without end
                raise RemoteProtocolError(f"a DHT message of {length} bytes; 1 to {MAX_MESSAGE_BYTES} are possible")
            if len(self._buffer) < head + length:
                return
            message = bytes(self._buffer[head : head + length])
            del self._buffer[: head + length]
            yield message

    @property
    def pending(self) -> bool:
        """Whether a message has begun and not ended; True at the end of a stream means it was cut off."""
        return bool(self._buffer)
