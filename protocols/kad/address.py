"""TCP addresses between text and the binary form that DHT messages carry (multiformats.io/multiaddr).

Only what this node can dial is read: a host, a TCP port and perhaps the peer id. Other transports are common in
DHT answers and mean nothing here.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId, base58_decode, base58_encode
from protocols.protobuf import put_varint, take_varint

MAX_ADDRESS_BYTES: Final = 320  # a DNS name of 253 bytes, a port, a peer id
_IP: Final = {"ip4": (4, 4), "ip6": (41, 16)}  # multicodec and bytes of the value
_DNS: Final = {"dns": 53, "dns4": 54, "dns6": 55}
_TCP: Final = 6
_P2P: Final = 421
_IP_NAMES: Final = {code: (name, size) for name, (code, size) in _IP.items()}
_DNS_NAMES: Final = {code: name for name, code in _DNS.items()}
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]{0,251}[A-Za-z0-9_.])?")
_SHA2_256: Final = b"\x12\x20"


def peer_bytes(peer: PeerId) -> bytes:
    """A peer id as DHT messages carry it. Raises RemoteProtocolError for what is no peer id."""
    data = base58_decode(peer)
    if not _is_peer(data):
        raise RemoteProtocolError(f"{peer[:60]!r} is no peer id")
    return data


def peer_of(data: bytes) -> PeerId | None:
    """The peer id of these bytes; None for what is none."""
    return PeerId(base58_encode(data)) if _is_peer(data) else None


def _is_peer(data: bytes) -> bool:
    """The multihash of a public key: the key itself (at most 42 bytes, libp2p peer-ids.md) or its sha2-256."""
    if data[:2] == _SHA2_256:
        return len(data) == 34
    return 3 <= len(data) <= 44 and data[0] == 0 and data[1] == len(data) - 2


def address_bytes(text: str) -> bytes:
    """The binary form of /ip4/192.0.2.1/tcp/4331, with or without /p2p/... behind it (which is left off).

    Raises LocalProtocolError for another form.
    """
    parts = text.split("/")
    try:
        if len(parts) not in (5, 7) or parts[0] or parts[3] != "tcp" or parts[5:6] not in ([], ["p2p"]):
            raise ValueError("it is not a host and a TCP port")
        port = int(parts[4]).to_bytes(2, "big")
        kind, host = parts[1], parts[2]
        if kind in _IP:
            value = ipaddress.ip_address(host).packed
            if len(value) != _IP[kind][1]:
                raise ValueError(f"{host} is no {kind} address")
            head = put_varint(_IP[kind][0]) + value
        elif kind in _DNS and _HOST_NAME.fullmatch(host):
            head = put_varint(_DNS[kind]) + put_varint(len(host)) + host.encode()
        else:
            raise ValueError(f"{kind} is not known")
    except (ValueError, OverflowError) as error:
        raise LocalProtocolError(f"{text[:120]!r} can't be put into a DHT message: {error}") from error
    return head + put_varint(_TCP) + port


def address_of(data: bytes, peer: PeerId) -> str | None:
    """The address in these bytes, without a peer id; None for one that we can't dial or that names another peer."""
    if len(data) > MAX_ADDRESS_BYTES:
        return None
    try:
        return _read(data, peer)
    except (RemoteProtocolError, UnicodeDecodeError):
        return None


def _read(data: bytes, peer: PeerId) -> str | None:
    end = len(data)
    code, at = take_varint(data, 0, end)
    if code in _IP_NAMES:
        kind, size = _IP_NAMES[code]
        host = str(ipaddress.ip_address(data[at : at + size])) if at + size <= end else ""
    elif code in _DNS_NAMES:
        kind = _DNS_NAMES[code]
        size, at = take_varint(data, at, end)
        host = data[at : at + size].decode("ascii") if at + size <= end else ""
        if not _HOST_NAME.fullmatch(host):
            return None
    else:
        return None
    code, at = take_varint(data, at + size, end)
    port = int.from_bytes(data[at : at + 2], "big") if at + 2 <= end else 0
    if code != _TCP or not port:
        return None
    at += 2
    if at < end:
        code, at = take_varint(data, at, end)
        size, at = take_varint(data, at, end)
        if code != _P2P or data[at:] != base58_decode(peer) or at + size != end:
            return None
    return f"/{kind}/{host}/tcp/{port}"
