"""The composition root: the only file that knows how a node fits together.

Nesting is the shutdown order: what is opened last is cancelled first.

    ground    network host, content, membership, discovery, guests, directory, pipes
    work      placement, stage, readiness, inventory, replication, arrival, upkeep of the advert, control socket
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final

import structlog
import trio

from meshnode import __version__
from meshnode.config.settings import Config
from meshnode.core.clock import Wall
from meshnode.core.errors import ContentUnavailable, Declined
from meshnode.core.health import Health
from meshnode.core.service import Service, supervise
from meshnode.core.signal import Changes
from meshnode.core.workers import Workers
from meshnode.engine.port import Engine, StageSpec
from meshnode.ipfs.fallback import Fallback, Source
from meshnode.ipfs.rpc import IpfsApi
from meshnode.membership.identity import Identity
from meshnode.membership.port import Membership
from meshnode.membership.registry import Registry
from meshnode.model.facts import facts_of
from meshnode.model.release import ServedRelease
from meshnode.net.pipes import Pipes
from meshnode.net.port import Host, PeerEvent
from meshnode.policy.route import NoRoute, plan_route
from meshnode.services.content.access import Access
from meshnode.services.content.service import ContentService
from meshnode.services.content.sources import Sources
from meshnode.services.dht import DhtClient, DhtSettings
from meshnode.services.directory.directory import DirectoryService, DirectorySettings, next_incarnation
from meshnode.services.discovery import DiscoveryService
from meshnode.services.external_peers import ExternalPeers, ExternalSettings
from meshnode.services.holds import HoldStreams
from meshnode.services.inference.origin import GenerationService, Receipt, Request, Target
from meshnode.services.inference.readiness import ReadinessService
from meshnode.services.inference.stage import StageService
from meshnode.services.inference.text import AnsweringService, Question, Text
from meshnode.services.inventory import InventoryService
from meshnode.services.ipfs_daemon import IpfsDaemonService, Publication
from meshnode.services.membership import Introduction, MembershipService
from meshnode.services.placement import PlacementConfig, PlacementService
from meshnode.services.port import Progress
from meshnode.services.releases import ArrivalService
from meshnode.services.replication.copies import Duties, ReplicationService, ReplicationSettings
from meshnode.services.replication.shelves import Shelves
from meshnode.state import releases
from meshnode.state.port import State
from meshnode.store.port import OpenFile, Store
from protocols.advert.messages import Advert, RoundTrip
from protocols.bitswap import messages as bitswap
from protocols.errors import RemoteProtocolError
from protocols.ids import Cid, PeerId, short
from protocols.manifest.codec import open_manifest
from protocols.manifest.messages import FileRef, Manifest
from protocols.membership import messages as membership
from protocols.pipe.messages import Close, Hop, Message, Open, Opened, Refused, Sampling, Step, Token

UPKEEP_SECONDS: Final = 0.5  # how often the advert's load and round trips are looked at
ROUND_TRIP_CHANGE: Final = 0.3  # a link is advertised again when it changed by this share
PROBE_TOKENS: Final = (1, 1)  # any two token ids: what is proven is that the chain answers

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Served:
    """The model that the network serves, with its manifest."""

    cid: Cid
    variant: str
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this device is."""

    name: str  # for people
    free_memory_bytes: int  # at the start
    cpus: int
    tags: tuple[str, ...]  # "cpu", "gpu", "mains", "battery"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a node is made of. `assemble.py` makes them of real things, `sim/` of things in memory."""

    identity: Identity
    membership: Membership  # our place in the network
    host: Host
    store: Store
    state: State
    engine: Callable[[StageSpec], Engine]  # a new engine for a span
    sources: tuple[Source, ...]  # asked for what no peer gives, in this order
    daemon: IpfsApi | None  # the operator's own, one of the sources
    machine: Machine
    health: Health
    wall: Wall
    rng: random.Random
    workers: Workers  # for what blocks: disks, hashes


class Node:
    """One running node."""

    def __init__(self, parts: Parts, config: Config) -> None:
        """Wires every service over the parts; nothing runs yet. `config`: what the owner has set."""
        self.parts = parts
        self.config = config
        identity, wall, rng = parts.identity, parts.wall, parts.rng
        self.identity = identity
        self.membership_file = parts.membership
        self.database = parts.state
        self.store = parts.store
        self.health = parts.health
        self.host = parts.host
        self.began_ms = wall()
        self.incarnation = next_incarnation(self.database, identity.peer_id, self.began_ms)
        anyone = config.content.share == "anyone"
        self.external = ExternalPeers(
            self.host,
            ExternalSettings(
                addresses=config.content.ipfs_peers,
                protocols=(bitswap.PROTOCOL,),
                offers=(bitswap.PROTOCOL,) if anyone else (),
                entrance=membership.PROTOCOL,
            ),
            rng,
            health=self.health,
        )
        self.membership = MembershipService(
            self.host,
            Registry(identity, parts.membership, parts.state, wall),
            self.external,
            self.health,
            wall,
            Introduction(name=parts.machine.name, software=__version__),
        )
        memory = config.serve.memory.of(parts.machine.free_memory_bytes)
        self.directory = DirectoryService(
            self.host,
            identity,
            self.membership,
            self.database,
            self.health,
            wall,
            DirectorySettings(
                topic=f"/meshnode/records/{self.membership_file.network_id}",
                first=self._first_advert(parts.machine, memory),
                rng=rng,
            ),
        )
        self.discovery = DiscoveryService(
            self.host, self.database, self.directory, config.network.bootstrap, self.health, rng, wall
        )
        self.inventory = InventoryService(self.directory, self.store, self.health)
        self.dht = (
            DhtClient(
                self.host,
                self.external,
                self.membership,
                DhtSettings(seeds=config.content.dht, protocols=(bitswap.PROTOCOL,)),
                rng,
                shared=self.inventory if anyone else None,
                health=self.health,
            )
            if config.content.dht
            else None
        )
        outside = Fallback(parts.sources) if parts.sources else None
        self.content = ContentService(
            self.host,
            self.store,
            self.directory,
            Sources(self.host, self.directory, self.external, finder=self.dht, outside=outside),
            Access(config.content.share, self.membership, self.external),
            self.health,
            parts.workers,
        )
        self.daemon = None if parts.daemon is None else self._look_after(parts.daemon)
        self.pipes = Pipes(self.host)
        holds = HoldStreams(self.host)
        self.placement = PlacementService(
            peer=identity.peer_id,
            incarnation=self.incarnation,
            directory=self.directory,
            fetch=self._fetch,
            fetch_block=self.content.block,
            reveal=self._reveal,
            content=self.store,
            open_manifest=open_manifest,
            engine_factory=parts.engine,
            config=PlacementConfig(
                memory_bytes=memory,
                max_layers=config.serve.layers,
                threads=config.serve.threads,
                max_sessions=config.serve.sessions,
                kv_bytes=config.serve.kv_memory.of(memory),
                engine=config.serve.engine,
            ),
            health=self.health,
            draw=rng.random,
            holds=holds,
            wall=wall,
        )
        holds.serve(self.placement.answer_hold)
        self.stage = StageService(
            us=identity.peer_id,
            send=self.pipes.send,
            serving=self.placement.engine,
            engine_lost=self.placement.engine_lost,
        )
        self.generation = GenerationService(
            us=identity.peer_id, send=self.pipes.send, target=self._target, route=self._route, rng=rng
        )
        self.pipes.deliver_to(self._deliver)
        self.pipes.report_to(self._lose)
        self.answering = AnsweringService(manifest=self._manifest, fetch=self._fetch_readable, workers=parts.workers)
        self.readiness = ReadinessService(
            chain=self._chain, changed=self.directory.changes.wait, probe=self._probe, health=self.health
        )
        self.replication = ReplicationService(
            self.directory,
            Shelves(identity.peer_id, self.directory, self.inventory, self.store),
            _Releases(self),
            self.content,
            Duties(_Opening(self), _Load(self)),
            ReplicationSettings(replicas=config.content.replicas),
            self.health,
        )
        self.arrival = ArrivalService(
            waiting=lambda: releases.waiting(self.database),
            fetch_block=self.content.block,
            announce=self.announce,
            forget=lambda: releases.wait_no_longer(self.database),
            health=self.health,
        )
        self._remembered: tuple[str, str] | None = None
        self.stopping = trio.Event()
        self.ended = trio.Event()

    def _look_after(self, ipfs: IpfsApi) -> IpfsDaemonService:
        """The operator's own daemon."""
        publication = Publication(
            ipfs,
            self.store,
            self.database,
            self.health,
            held=self.inventory,
            releases=_Releases(self) if self.config.content.ipfs_publish else None,
        )
        return IpfsDaemonService(ipfs, self.host, self.external, self.membership, publication, self.health)

    def _first_advert(self, machine: Machine, memory: int) -> Advert:
        return Advert(
            peer=self.identity.peer_id,
            incarnation=self.incarnation,
            sequence=0,
            issued_ms=0,
            name=machine.name[:64],
            software=__version__,
            roles=(),
            addresses=(),
            cpus=machine.cpus,
            memory_bytes=memory,
            disk_free_bytes=self.store.usage().room_bytes,
            max_layers=self.config.serve.layers,
            tags=machine.tags,
            serving=None,
        )

    # ------------------------------------------------------------ running

    async def run(self, *extra: Service, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until `stopping` is set; then hand over our layers, say goodbye and stop from the inside out.

        `extra`: services on top (the control socket).
        """
        events = self.host.events()
        async with trio.open_nursery() as ground:
            await ground.start(self.host.run)
            for below in (
                self.content,
                self.directory,
                self.membership,
                self.discovery,
                self.external,
                *(() if self.dht is None else (self.dht,)),
                self.pipes,
                *self.parts.sources,
                *(() if self.daemon is None else (self.daemon,)),
            ):
                await ground.start(supervise, below)
            async with trio.open_nursery() as work:
                work.start_soon(self._follow_peers, events)
                work.start_soon(self._keep_advert)
                for service in (
                    self.stage,
                    self.placement,
                    self.readiness,
                    self.inventory,
                    self.replication,
                    self.arrival,
                    *extra,
                ):
                    await work.start(supervise, service)
                log.info("node.started", peer=self.identity.peer_id, addresses=self.host.addresses)
                task_status.started()
                await self.stopping.wait()
                log.info("node.leaving")
                await self.replication.drain()
                await self.placement.drain()
                work.cancel_scope.cancel()
            await self.directory.goodbye()
            ground.cancel_scope.cancel()
        log.info("node.stopped")
        self.ended.set()

    async def _follow_peers(self, events: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        async for event in events:
            if event.connected:
                self.readiness.look_again()
            else:
                self._lose(event.peer, event.reason)

    def _lose(self, peer: PeerId, reason: str) -> None:
        self.stage.peer_gone(peer, reason)
        self.generation.peer_gone(peer, reason)
        chain, _ = self._chain()
        if isinstance(chain, tuple) and any(hop.peer == peer for hop in chain):
            self.readiness.doubt(f"{short(peer)} went away: {reason}")

    async def _deliver(self, peer: PeerId, message: Message, body: bytes, network_us: int) -> None:
        match message:
            case Open() | Step() | Close():
                await self.stage.receive(peer, message, body, network_us)
            case Opened() | Refused() | Token():
                await self.generation.receive(peer, message, network_us)
            case _:
                pass

    async def _keep_advert(self) -> None:
        """Load and links, put into our advert when they change."""
        while True:
            self.placement.report_load(self.stage.sessions, self.stage.queue_us)
            before = self.directory.me().round_trips
            trips = self._round_trips(before)
            if trips != before:
                self.directory.advertise(replace(self.directory.me(), round_trips=trips))
            await trio.sleep(UPKEEP_SECONDS)

    def _round_trips(self, before: tuple[RoundTrip, ...]) -> tuple[RoundTrip, ...]:
        old = {trip.peer: trip.us for trip in before}
        out = []
        for peer in self.host.peers[:64]:
            us = self.host.round_trip_us(peer)
            if us is None:
                continue
            was = old.get(peer)
            if was is not None and abs(us - was) <= ROUND_TRIP_CHANGE * was + 500:
                us = was
            out.append(RoundTrip(peer=peer, us=us))
        return tuple(out)

    # ------------------------------------------------------------ the model and the chain

    def served(self) -> Served | None:
        """The release that the network serves, once its manifest is here."""
        release = self.placement.release()
        if release is None:
            return None
        head, manifest = release
        if self._remembered != (head.manifest, head.variant):
            self._remembered = (head.manifest, head.variant)
            releases.remember(self.database, Cid(head.manifest), head.variant)  # for `meshnode model list`
        return Served(Cid(head.manifest), head.variant, manifest)

    def _manifest(self) -> tuple[Cid, Manifest] | None:
        served = self.served()
        return None if served is None else (served.cid, served.manifest)

    def _target(self) -> Target | None:
        served = self.served()
        if served is None:
            return None
        shape = served.manifest.architecture
        return Target(served.cid, served.variant, shape.layers, shape.context, frozenset(shape.eos_ids))

    def _route(self, target: Target, seed: int, avoid: frozenset[PeerId]) -> tuple[Hop, ...] | NoRoute:
        served = self.served()
        row_bytes = 4 * served.manifest.architecture.hidden if served else 4096
        return plan_route(
            self.directory.live(),
            target.manifest,
            target.variant,
            target.layers,
            self.identity.peer_id,
            seed,
            self.generation.in_flight(),
            avoid,
            row_bytes=row_bytes,
        )

    def _chain(self) -> tuple[object, str]:
        target = self._target()
        if target is None:
            head = self.directory.announcement()
            if head is None and (manifest := self.arrival.awaited) is not None:
                return None, f"the manifest {manifest} of the model that was added here has not arrived yet"
            if head is None:
                return None, "the network serves no model yet; add one with: meshnode model add PATH"
            return None, f"the description of the model {head.name} has not arrived yet"
        route = self._route(target, 0, frozenset())
        return (None, route.reason) if isinstance(route, NoRoute) else (route, "")

    async def _fetch(self, cid: Cid, size: int, *, progress: Progress | None = None) -> None:
        await self.content.fetch(FileRef(cid=cid, size=size), progress=progress)

    async def _fetch_readable(self, cid: Cid, size: int) -> OpenFile:
        return await self.content.open(FileRef(cid=cid, size=size))

    async def _reveal(self, cid: Cid) -> OpenFile:
        revealed = await self.parts.workers.run(self.store.reveal, cid)
        if revealed is None:
            raise ContentUnavailable(f"the file {cid} was removed while it was being opened; ask again", cid=cid)
        return revealed

    async def _probe(self) -> None:
        request = Request(PROBE_TOKENS, 1, Sampling(seed=0))
        async with aclosing(self.generation.generate(request)) as pieces:
            async for _ in pieces:
                pass

    async def answer(self, question: Question) -> AsyncGenerator[Text | Receipt, None]:
        """The answer in words piece by piece, at last its receipt. Use it in `contextlib.aclosing`.

        Raises what `AnsweringService.answer` and `GenerationService.generate` raise.
        """
        receipt: Receipt | None = None

        async def tokens(
            prompt: tuple[int, ...], max_tokens: int, sampling: Sampling
        ) -> AsyncGenerator[int | str, None]:
            nonlocal receipt
            async with aclosing(self.generation.generate(Request(prompt, max_tokens, sampling))) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Receipt):
                        yield piece.reason
                    else:
                        receipt = piece.receipt
                        yield piece.token

        async with aclosing(self.answering.answer(question, tokens)) as words:
            async for word in words:
                if isinstance(word, Text):
                    yield word
                elif receipt is not None:  # an answer has one token or more
                    receipt.reason = word.reason
                    yield receipt

    def announce(self, manifest: Cid, variant: str) -> None:
        """Say that the network serves this release from now on. Its manifest must be in our store.

        Args:
          variant: empty for the smallest one.

        Raises:
          Declined: `forbidden` or `no-model`.
        """
        block = self.store.block(manifest)
        if block is None:
            raise Declined("no-model", f"the manifest {manifest} is not in this node's store")
        try:
            release = open_manifest(block)
        except RemoteProtocolError as error:
            raise Declined("no-model", f"the manifest {manifest} does not hold: {error}") from error
        variant = variant or release.smallest_variant()
        if variant not in release.variants:
            raise Declined(
                "no-model", f"{release.name} has no variant {variant}; it has {', '.join(release.variants)}"
            )
        self.directory.announce(name=release.name, version=release.version, manifest=manifest, variant=variant)
        releases.wait_no_longer(self.database)


class _Releases:
    """What the network serves, for those who wait for it. Until `services/releases.py` says so."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.changes = node.directory.changes

    @property
    def current(self) -> ServedRelease | None:
        served = self._node.served()
        if served is None:
            return None
        return ServedRelease(served.cid, served.variant, served.manifest, facts_of(served.manifest, served.variant))


class _Opening:
    """Until placement's spans say so."""

    def __init__(self, node: Node) -> None:
        self._node = node

    @property
    def loading(self) -> object | None:
        return self._node.placement.progress()


class _Load:
    """Until the stage's load says so."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.changes = Changes()

    @property
    def sessions(self) -> int:
        return self._node.stage.sessions

    @property
    def queue_us(self) -> int:
        return self._node.stage.queue_us
