"""Addresses as people write them: /ip4/192.0.2.1/tcp/4331/p2p/12D3KooW… (multiformats.io/multiaddr)."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace
from typing import Final

from protocols.errors import RemoteProtocolError

MAX_DIGITS: Final = 20  # of a port; Python reads 4,300 at most
_HOSTS: Final = ("ip4", "ip6", "dns", "dns4", "dns6")


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP endpoint, and whose it is."""

    kind: str  # one of ip4, ip6, dns, dns4, dns6
    host: str
    port: int
    peer: str = ""

    def __str__(self) -> str:
        owner = f"/p2p/{self.peer}" if self.peer else ""
        return f"/{self.kind}/{self.host}/tcp/{self.port}{owner}"


def parse_address(text: str) -> Address:
    """Raises RemoteProtocolError for anything but a host, a TCP port and perhaps a peer id."""
    parts = text.split("/")
    known = len(parts) in (5, 7) and not parts[0] and parts[1] in _HOSTS and parts[3] == "tcp"
    if not known or parts[5:6] not in ([], ["p2p"]) or not parts[4].isascii() or not parts[4].isdigit():
        raise RemoteProtocolError(
            f"{text[:120]!r} is no address that can be used; one like /ip4/192.0.2.1/tcp/4331/p2p/12D3KooW... can"
        )
    kind, host, port = parts[1], parts[2], int(parts[4][:MAX_DIGITS])
    if port > 65535 or len(parts[4]) > MAX_DIGITS:
        raise RemoteProtocolError(f"{text[:120]!r} has the port {parts[4][:20]}; 65535 is the highest")
    if kind in ("ip4", "ip6") and not _is_ip(host, int(kind[2])):
        raise RemoteProtocolError(f"{text[:120]!r}: {host} is no IPv{kind[2]} address")
    return Address(kind, host, port, parts[6] if len(parts) == 7 else "")


def _is_ip(text: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(text).version == version
    except ValueError:
        return False


def address_of(host: str, port: int, peer: str = "") -> Address:
    """The address of an IP endpoint."""
    return Address("ip6" if ":" in host else "ip4", host, port, peer)


def is_loopback(text: str) -> bool:
    """Whether only programs on the same machine can dial this address."""
    return text.startswith(("/ip4/127.", "/ip6/::1/"))


def owned(text: str, peer: str) -> str:
    """An address without an owner, as the address of a peer. Raises RemoteProtocolError."""
    return str(replace(parse_address(text), peer=peer))
