"""Datagrams to and from everybody on the local networks of this machine: the multicast group of mDNS, by IPv4."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Final

import psutil
import trio

from meshnode.core.log import get_logger

GROUP: Final = "224.0.0.251"
PORT: Final = 5353
HOPS: Final = 255  # RFC 6762, section 11; nothing of it leaves the network all the same: the group is link-local
MAX_BYTES: Final = 9000
PAUSE_S: Final = 1.0  # after a socket that could not be read

_log = get_logger("net")


class Multicast:
    """`LocalNetwork` of port.py."""

    def __init__(self) -> None:
        self._socket: trio.socket.SocketType | None = None
        self._interfaces: set[str] = set()  # their addresses, in whose networks we take part
        self._open = trio.Event()

    async def renew(self) -> None:
        """Take part in the networks that there are now; quietly in none, where that is not allowed."""
        interfaces = _interfaces()
        if interfaces and self._socket is None:
            self._socket = _bind()
        if self._socket is None:
            return
        for ip in interfaces - self._interfaces:
            member = struct.pack("4s4s", socket.inet_aton(GROUP), socket.inet_aton(ip))
            try:
                self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
            except OSError as error:
                _log.debug("multicast.unjoined", address=ip, reason=str(error))
        self._interfaces = interfaces
        self._open.set()

    async def send(self, data: bytes) -> None:
        """To every network that we take part in, as far as it is up."""
        for ip in sorted(self._interfaces):
            if self._socket is None:
                return
            try:
                self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(ip))
                await self._socket.sendto(data, (GROUP, PORT))
            except OSError as error:
                _log.debug("multicast.unsent", address=ip, reason=str(error))

    async def receive(self) -> bytes:
        """The next datagram of anybody, our own ones too. If cancelled: nothing was taken."""
        while True:
            await self._open.wait()
            assert self._socket is not None, "it is there before the event is set"
            try:
                return await self._socket.recv(MAX_BYTES)
            except OSError as error:
                _log.debug("multicast.unreceived", reason=str(error))
                await trio.sleep(PAUSE_S)

    def close(self) -> None:
        """Nothing is sent or received any more."""
        sock, self._socket, self._open = self._socket, None, trio.Event()
        self._interfaces = set()
        if sock is not None:
            sock.close()


def _bind() -> trio.socket.SocketType | None:
    """A socket beside those of other programs that speak mDNS; None where that can't be."""
    sock = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, HOPS)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)  # other nodes on this machine
        # An address and no name: nothing to be looked up, so nothing to wait for.
        sock._sock.bind(("", PORT))  # type: ignore[attr-defined]
    except OSError as error:
        _log.info("multicast.unavailable", reason=str(error))
        sock.close()
        return None
    return sock


def _interfaces() -> set[str]:
    """IPv4 addresses of interfaces that are up and take multicast; one for each network is enough."""
    stats = psutil.net_if_stats()
    return {
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        if name in stats and stats[name].isup and "multicast" in stats[name].flags.split(",")
        for entry in entries
        if entry.family == socket.AF_INET and not ipaddress.ip_address(entry.address).is_loopback
    }
