"""Members on the same local network find each other there, without an address or a bootstrap peer: protocols/mdns.

Others on the network see that a node is there, and nothing that lasts: neither its id nor that of its network.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Protocol

import nacl.utils
import trio

from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.net.port import Host, LocalNetwork
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.mdns.machine import Discovery
from protocols.mdns.messages import MAX_ADDRESSES, Seal
from protocols.membership import Secrets
from protocols.multiaddr import is_loopback

_log = get_logger("nearby")


class SecretHolder(Protocol):
    """Knows the secrets of the network (`membership.py`)."""

    @property
    def secrets(self) -> Secrets: ...

    @property
    def renewed(self) -> Changes:
        """Whenever there is a new one."""


def _seal_of(holder: SecretHolder) -> Seal:
    present = holder.secrets.present.secret
    return Seal(present, [one.secret for one in holder.secrets.all if one.secret != present])


class LocalDiscovery:
    """`Nearby` of services/port.py."""

    name = "nearby"

    def __init__(self, host: Host, network: LocalNetwork, holder: SecretHolder, rng: random.Random) -> None:
        """
        Args:
          holder: has the secret of the network of members; only who has it, too, can read what we say.
          rng: spreads the moments. Names and nonces are everybody's to see, so it has no part in them.
        """
        self.changes = Changes()
        self._host = host
        self._network = network
        self._holder = holder
        self._discovery = Discovery(host.peer_id, _seal_of(holder), nacl.utils.random, rng.random)
        self._sooner = Changes()  # something is to be sent earlier than it seemed

    def found(self) -> Mapping[PeerId, tuple[str, ...]]:
        """Members that were heard lately, and where they listen."""
        return self._discovery.found(trio.current_time())

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ask and answer until cancelled. Start it when the host listens."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow_surroundings)
                nursery.start_soon(self._follow_links)
                nursery.start_soon(self._follow_secret)
                nursery.start_soon(self._receive)
                task_status.started()
                await self._send()
        finally:
            self._network.close()

    async def _follow_surroundings(self) -> None:
        version = self._host.surroundings.version
        while True:
            await self._network.renew()
            listed = tuple(address for address in self._host.addresses if not is_loopback(address))
            self._discovery.begin(listed[:MAX_ADDRESSES], trio.current_time())
            self._sooner.notify()
            version = await self._host.surroundings.wait(version)

    async def _follow_links(self) -> None:
        version = self._host.links.version
        while True:
            self._discovery.alone(not self._host.peers, trio.current_time())
            self._sooner.notify()
            version = await self._host.links.wait(version)

    async def _follow_secret(self) -> None:
        version = self._holder.renewed.version
        while True:
            version = await self._holder.renewed.wait(version)
            self._discovery.reseal(_seal_of(self._holder))

    async def _send(self) -> None:
        while True:
            version = self._sooner.version
            for packet in self._discovery.tick(trio.current_time()):
                await self._network.send(packet)
            with trio.move_on_at(self._discovery.deadline):
                await self._sooner.wait(version)

    async def _receive(self) -> None:
        while True:
            data = await self._network.receive()
            before = self._discovery.deadline
            try:
                changed = self._discovery.receive(data, trio.current_time())
            except RemoteProtocolError as error:
                _log.info("hint.refused", reason=str(error))
                continue
            if changed:
                self.changes.notify()
            if self._discovery.deadline < before:
                self._sooner.notify()
