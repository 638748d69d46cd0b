"""Under which addresses this machine can be reached."""

from __future__ import annotations

import ipaddress
import socket

import psutil


def reachable_hosts(host: str) -> list[str]:
    """The IP addresses under which a socket bound to `host` can be dialled: all of this machine's for 0.0.0.0 and
    ::, loopback last."""
    if host not in ("0.0.0.0", "::"):
        return [host]
    family = socket.AF_INET if host == "0.0.0.0" else socket.AF_INET6
    entries = [entry for interface in psutil.net_if_addrs().values() for entry in interface]
    # Link-local IPv6 needs a zone, which no multiaddr carries.
    usable = [entry.address for entry in entries if entry.family == family and "%" not in entry.address]
    return sorted(usable, key=lambda ip: (ipaddress.ip_address(ip).is_loopback, ip))
