"""Nodes with real files, real keys and real membership services on an in-memory network, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from meshnode.core.clock import VirtualWall
from meshnode.core.health import Health
from meshnode.core.paths import Paths
from meshnode.membership.enrolment import create_invite, init_network, open_identity
from meshnode.membership.identity import Identity
from meshnode.membership.joining import join
from meshnode.membership.network import load_network
from meshnode.membership.pairing import PairingTickets
from meshnode.membership.registry import Registry
from meshnode.net.port import Stream
from meshnode.services.membership import Introduction, MembershipService
from meshnode.services.pairing import PairingService
from meshnode.sim.network import MemoryHost, MemoryNetwork
from meshnode.state.database import Database
from protocols.ids import PeerId

ECHO = "/test/echo/1"  # stands for every protocol that only members may use


def make_host(network: MemoryNetwork, identity: Identity) -> MemoryHost:
    return network.host(identity.peer_id)


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


class Nobody:
    """No stranger may stay."""

    def take_in(self, peer: PeerId) -> bool:
        return False


@dataclass
class Node:
    """One node while it runs."""

    name: str
    folder: Path
    identity: Identity
    host: MemoryHost
    database: Database
    membership: MembershipService
    health: Health
    wall: VirtualWall
    pairing: PairingService
    ended: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def peer_id(self) -> PeerId:
        return self.host.peer_id

    async def stop(self) -> None:
        self.scope.cancel()
        await self.ended.wait()

    async def call(self, other: Node) -> bytes:
        """Use a protocol of another node that only members may use."""
        stream = await self.host.open_stream(other.peer_id, ECHO)
        await stream.send_all(b"hello")
        answer = await stream.receive_some()
        await stream.aclose()
        return answer

    async def connect(self, other: Node) -> None:
        await self.host.connect(other.peer_id, other.host.addresses)

    async def meet(self, other: Node) -> None:
        """Connect, and wait until both have admitted each other."""
        await self.connect(other)
        with trio.fail_after(10):
            await self.membership.admitted(other.peer_id)
            await other.membership.admitted(self.peer_id)


class Mesh:
    """Makes nodes, lets them join, starts and stops them."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self.folder = folder
        self.wall = VirtualWall()
        self.network = MemoryNetwork()
        self._nursery = nursery

    async def found(self, name: str = "ann", *, network: str = "home") -> Node:
        """The first node of a new network."""
        init_network(self.folder / name, network, node_name=name, clock=self.wall)
        return await self.start(name)

    def ticket(
        self, node: Node, *, addresses: Sequence[str] = (), roles: Sequence[str] = ("serve", "publish"), **more: float
    ) -> str:
        """A ticket that a running node has made."""
        return create_invite(
            load_network(node.folder),
            node.database,
            roles=roles,
            uses=int(more.get("uses", 1)),
            ttl_s=more.get("ttl_s", 3600.0),
            member_ttl_s=more.get("member_ttl_s", 0.0),
            addresses=addresses or node.host.addresses,
            clock=self.wall,
        )

    async def enrol(self, name: str, ticket: str) -> Path:
        """Redeem a ticket for a new device, as `meshnode join` does."""
        folder = self.folder / name
        async with self.stranger(name) as host:
            await join(host, ticket, folder=folder, name=name, software="0.1.0", clock=self.wall)
        return folder

    async def enter(self, name: str, ticket: str) -> Node:
        """Join and start."""
        await self.enrol(name, ticket)
        return await self.start(name)

    @asynccontextmanager
    async def stranger(self, name: str) -> AsyncIterator[MemoryHost]:
        """A running host with the key of a folder, and nothing else."""
        host, scope = make_host(self.network, open_identity(self.folder / name)), trio.CancelScope()

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            with scope:
                await host.run(task_status=task_status)

        await self._nursery.start(run)
        try:
            yield host
        finally:
            scope.cancel()

    async def start(self, name: str, *, skew_ms: int = 0, passive: bool = False) -> Node:
        """Start a node whose folder holds a membership. `passive`: it answers hellos, but says none."""
        folder = self.folder / name
        identity = Identity.load(folder)
        host = make_host(self.network, identity)
        wall = VirtualWall(self.wall(), skew_ms=skew_ms)
        database, health = Database(Paths(folder).state), Health()
        membership = load_network(folder)
        service = MembershipService(
            host,
            Registry(identity, membership, database, wall),
            Nobody(),
            health,
            wall,
            Introduction(name=membership.name, software="0.1.0"),
        )
        host.handle(ECHO, echo)
        pairing = PairingService(host, PairingTickets(membership, database, lambda: host.addresses, wall))
        node = Node(name, folder, identity, host, database, service, health, wall, pairing)
        await self._nursery.start(self._run, node, passive)
        return node

    async def _run(self, node: Node, passive: bool, *, task_status: trio.TaskStatus[None]) -> None:
        with node.scope, node.database:
            async with trio.open_nursery() as ground:
                await ground.start(node.host.run)
                async with trio.open_nursery() as services:
                    if not passive:
                        await services.start(node.membership.run)
                    task_status.started()
                    await trio.sleep_forever()
        node.ended.set()


@asynccontextmanager
async def open_mesh(folder: Path) -> AsyncIterator[Mesh]:
    async with trio.open_nursery() as nursery:
        yield Mesh(folder, nursery)
        nursery.cancel_scope.cancel()
