"""Nodes with a real directory service on the in-memory network, in virtual time."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import trio

from meshnode.core.clock import VirtualWall
from meshnode.core.health import Health
from meshnode.core.signal import Changes
from meshnode.services.directory.author import next_incarnation
from meshnode.services.directory.directory import DirectoryService, DirectorySettings
from meshnode.sim.network import MemoryHost, MemoryNetwork
from meshnode.state.memory_state import MemoryState
from protocols.envelope import sign_record
from protocols.ids import PeerId
from tests.adverts import advert_of, key_of, peer_of

TOPIC = "/meshnode/directory/test"
ADMISSION_S = 0.2  # what membership takes to admit a peer that has connected


class Members:
    """The certificates that everybody knows."""

    def __init__(self) -> None:
        self.changes = Changes()
        self.roles: dict[PeerId, frozenset[str]] = {}
        self.founders: set[PeerId] = set()

    def roles_of(self, peer: PeerId) -> frozenset[str]:
        return self.roles.get(peer, frozenset())

    def is_founder(self, peer: PeerId) -> bool:
        return peer in self.founders

    def branch_of(self, peer: PeerId) -> PeerId:
        return peer

    def grant(self, peer: PeerId, roles: Iterable[str]) -> None:
        """A certificate became known; without roles, it was withdrawn."""
        self.roles[peer] = frozenset(roles)
        self.changes.notify()


class Key:
    """A node key."""

    def __init__(self, number: int) -> None:
        self._key = key_of(number)

    def sign(self, domain: str, payload: bytes) -> bytes:
        return sign_record(self._key, domain, payload)


@dataclass
class Node:
    number: int
    host: MemoryHost
    directory: DirectoryService
    health: Health
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def peer(self) -> PeerId:
        return self.host.peer_id

    @property
    def sees(self) -> list[PeerId]:
        return list(self.directory.live())

    def says(self, **fields: Any) -> None:
        """Change fields of our own advert."""
        self.directory.advertise(replace(self.directory.me(), **fields))

    async def until(self, check: Callable[[DirectoryService], object], within: float) -> None:
        """Wait for changes of the directory until `check` holds. Raises trio.TooSlowError."""
        version = self.directory.changes.version
        with trio.fail_after(within):
            while not check(self.directory):
                version = await self.directory.changes.wait(version)

    async def sees_exactly(self, nodes: Iterable[Node], within: float) -> None:
        wanted = sorted(node.peer for node in nodes)
        await self.until(lambda directory: list(directory.live()) == wanted, within)

    async def stop(self) -> None:
        """End at once, like a killed process."""
        self.scope.cancel()
        await self.ended.wait()


class Mesh:
    """Starts nodes; every connection is admitted by both sides after `ADMISSION_S`."""

    def __init__(self, nursery: trio.Nursery, rng: random.Random) -> None:
        self.network = MemoryNetwork(rng=rng)
        self.rng = rng
        self.wall = VirtualWall()
        self.members = Members()
        self.states: dict[int, MemoryState] = {}
        self.nodes: list[Node] = []
        self._nursery = nursery
        self._admitted: defaultdict[tuple[PeerId, PeerId], trio.Event] = defaultdict(trio.Event)

    async def start(
        self,
        number: int,
        *,
        roles: Iterable[str] = ("serve",),
        skew_ms: int = 0,
        key: int | None = None,
        **fields: Any,
    ) -> Node:
        """Start a node. The same number again is a restart: same key, same store."""
        peer = peer_of(key or number)
        self.members.grant(peer, roles)
        state = self.states.setdefault(number, MemoryState())
        wall = VirtualWall(self.wall(), skew_ms=skew_ms)
        incarnation = next_incarnation(state, peer, wall())
        host, health = self.network.host(peer), Health()
        directory = DirectoryService(
            host,
            Key(key or number),
            self.members,
            state,
            health,
            wall,
            DirectorySettings(
                topic=TOPIC,
                first=advert_of(key or number, incarnation=incarnation, **fields),
                rng=random.Random(self.rng.random()),
            ),
        )
        node = Node(number, host, directory, health)
        await self._nursery.start(self._run, node)
        self.nodes = [other for other in self.nodes if other.number != number] + [node]
        return node

    async def bare(self, number: int, node: Node) -> MemoryHost:
        """A member without a directory, connected to `node`: what somebody hostile can do."""
        host = self.network.host(peer_of(number))
        self.members.grant(host.peer_id, ["serve"])
        host.subscribe(TOPIC, lambda forwarder, data: True)
        await self._nursery.start(host.run)
        self._nursery.start_soon(self._admit, host)
        await host.connect(node.peer, node.host.addresses)
        with trio.fail_after(5):
            await self._admitted[host.peer_id, node.peer].wait()
            await self._admitted[node.peer, host.peer_id].wait()
        return host

    async def _run(self, node: Node, *, task_status: trio.TaskStatus[None]) -> None:
        with node.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(node.host.run)
                nursery.start_soon(self._admit, node.host)
                await nursery.start(node.directory.run)
                task_status.started()
                await trio.sleep_forever()
        node.ended.set()

    async def _admit(self, host: MemoryHost) -> None:
        async for event in host.events():
            if event.connected:
                await trio.sleep(ADMISSION_S)
                host.admit(event.peer, True)
                self._admitted[host.peer_id, event.peer].set()

    async def line(self, *nodes: Node) -> None:
        """Connect each with the next."""
        for one, other in pairwise(nodes):
            await one.host.connect(other.peer, other.host.addresses)

    async def full(self, *nodes: Node) -> None:
        """Connect each with each."""
        for i, one in enumerate(nodes):
            for other in nodes[:i]:
                await one.host.connect(other.peer, other.host.addresses)


@asynccontextmanager
async def open_mesh(rng: random.Random) -> AsyncIterator[Mesh]:
    async with trio.open_nursery() as nursery:
        yield Mesh(nursery, rng)
        nursery.cancel_scope.cancel()
