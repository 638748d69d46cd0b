"""The two networks of the libp2p DHT, and which addresses belong to each: Amino among public ones, and the LAN.

A peer on Amino must not make us dial a device next to us, or ourselves; so an address in an answer is dialled only
if the network that the answer came from can lie there. Names are never dialled: they lead anywhere.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

from protocols.kad.messages import LAN_PROTOCOL, PROTOCOL

_PRIVATE: Final = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16", "fc00::/7")
)
_PUBLIC_6: Final = ipaddress.IPv6Network("2000::/3")


@dataclass(frozen=True, slots=True)
class DhtNetwork:
    """One of them."""

    name: str  # for people
    protocol: str
    private: bool = False  # private addresses belong to it
    loopback: bool = False  # so do those of this machine itself

    def takes(self, address: str) -> bool:
        """Whether an address (/ip4/192.0.2.1/tcp/4331) in an answer may be dialled, or one of ours may be named."""
        _, kind, host, *_ = address.split("/")
        if kind not in ("ip4", "ip6"):
            return False
        ip = ipaddress.ip_address(host)
        if ip.is_loopback:
            return self.loopback
        if is_private(ip):
            return self.private
        return _is_public(ip)


AMINO: Final = DhtNetwork("the public network", PROTOCOL)
LAN: Final = DhtNetwork("the local network", LAN_PROTOCOL, private=True)
LAN_HERE: Final = DhtNetwork("the local network", LAN_PROTOCOL, private=True, loopback=True)


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(ip, ipaddress.IPv6Address):
        # Tunnels into IPv4 can end at a private address.
        return ip in _PUBLIC_6 and ip.is_global and ip.sixtofour is None and ip.teredo is None
    return ip.is_global and not ip.is_multicast


def is_private(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address belongs to a local network (or a carrier's, 100.64.0.0/10)."""
    return any(ip.version == network.version and ip in network for network in _PRIVATE)


def network_of(address: str) -> DhtNetwork:
    """The network that a peer at this address belongs to, as its owner has written it; a name is a public one.

    LAN_HERE for an address of this machine: whoever names one means that others on this machine count.
    """
    _, kind, host, *_ = address.split("/")
    if kind not in ("ip4", "ip6"):
        return AMINO
    ip = ipaddress.ip_address(host)
    return LAN_HERE if ip.is_loopback else LAN if is_private(ip) else AMINO
