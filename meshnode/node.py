"""The composition root: the only file that knows how a node fits together.

Nesting is the shutdown order: what is opened last is cancelled first.

    ground    network host, content, membership, discovery, guests, directory, pipes
    work      placement, links, stage, readiness, inventory, replication, arrival, control socket
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog
import trio

from meshnode import __version__
from meshnode.config.settings import Config
from meshnode.core.clock import Wall
from meshnode.core.errors import ContentUnavailable, Declined
from meshnode.core.health import Health
from meshnode.core.service import Service, supervise
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
from meshnode.net.port import Host
from meshnode.services.content.fetch import PATIENCE_SECONDS, ContentService
from meshnode.services.dht import DhtClient, DhtSettings
from meshnode.services.directory.directory import DirectoryService, DirectorySettings, next_incarnation
from meshnode.services.discovery import DiscoveryService
from meshnode.services.external_peers import ExternalPeers, ExternalSettings
from meshnode.services.holds import HoldStreams
from meshnode.services.inference.load import StageLoad
from meshnode.services.inference.origin import OriginService
from meshnode.services.inference.readiness import ReadinessService
from meshnode.services.inference.router import Router
from meshnode.services.inference.stage import StageService
from meshnode.services.inference.text import TextService
from meshnode.services.inventory import InventoryService
from meshnode.services.ipfs_daemon import IpfsDaemonService, Publication
from meshnode.services.links import LinksService
from meshnode.services.membership import Introduction, MembershipService
from meshnode.services.placement import PlacementConfig, PlacementService
from meshnode.services.port import Progress
from meshnode.services.releases import ArrivalService
from meshnode.services.replication import ReplicationService
from meshnode.state import releases
from meshnode.state.port import State
from meshnode.store.port import OpenFile, Store
from protocols.advert.messages import Advert
from protocols.bitswap import messages as bitswap
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, Cid, PeerId, cid_codec, short
from protocols.manifest.codec import open_manifest
from protocols.manifest.messages import FileRef, Manifest
from protocols.membership import messages as membership

DHT_PATIENCE_SECONDS: Final = 60.0  # a search among strangers goes on for so long
UPKEEP_SECONDS: Final = 0.5  # how often bad providers are looked for

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
        self.inventory = InventoryService(self.directory, self.store, open_manifest)
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
            self.directory.providers,
            guests=self.external.configured,
            share_with_guests=config.content.share != "members",
            share_with_anyone=anyone,
            is_member=lambda peer: peer in self.membership.members(),
            patience=PATIENCE_SECONDS if self.dht is None else DHT_PATIENCE_SECONDS,
            seek=None if self.dht is None else self.dht.find,
            sought=None if self.dht is None else self.dht.so_far,
            advice=self._advice,
            workers=parts.workers,
            outside=None if outside is None else outside.block,
            tree_outside=None if outside is None else outside.tree,
            outside_so_far=None if outside is None else outside.so_far,
        )
        self.daemon = None if parts.daemon is None else self._look_after(parts.daemon)
        served = _Releases(self)
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
        self.load = StageLoad()
        self.stage = StageService(identity.peer_id, self.pipes, self.placement, self.load)
        router = Router(identity.peer_id, self.directory, served)
        self.origin = OriginService(identity.peer_id, self.pipes, router, served, rng)
        self.readiness = ReadinessService(router, self.origin, self.host, self.pipes, self.health)
        self.text = TextService(served, self.content, self.origin, self.readiness, parts.workers)
        self.links = LinksService(self.host, self.directory)
        self.replication = ReplicationService(
            us=identity.peer_id,
            directory=self.directory,
            release=self.placement.release,
            holdings=self.inventory.holdings,
            store=self.store,
            fetch=self._fetch,
            replicas=config.content.replicas,
            loading=lambda: self.placement.progress() is not None,
            busy=lambda: self.load.sessions > 0,
            health=self.health,
        )
        self.arrival = ArrivalService(
            waiting=lambda: releases.waiting(self.database),
            fetch_block=self.content.block,
            announce=self.announce,
            forget=lambda: releases.wait_no_longer(self.database),
            health=self.health,
        )
        self._remembered: tuple[str, str] | None = None
        self._liars: set[PeerId] = set()
        self.stopping = trio.Event()
        self.ended = trio.Event()

    def _advice(self, cid: Cid) -> str:
        """What our owner may not know when nobody gives a manifest; it may be on IPFS."""
        content = self.config.content
        if cid_codec(cid) != DAG_CBOR or content.ipfs_peers or content.dht or content.ipfs_api or content.gateways:
            return ""
        return (
            ", or name IPFS nodes that have it in content.ipfs_peers or peers of their DHT in content.dht: this node "
            "asks nobody outside its network now"
        )

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
        return IpfsDaemonService(
            ipfs, self.host, self.external, self.membership, self.content, publication, self.health
        )

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
                work.start_soon(self._report_load)
                work.start_soon(self._watch_providers)
                for service in (
                    self.links,
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

    async def _report_load(self) -> None:
        while True:
            await self.load.changes.wait()
            self.placement.report_load(self.load.sessions, self.load.queue_us)

    async def _watch_providers(self) -> None:
        while True:
            self._name_liars()
            await trio.sleep(UPKEEP_SECONDS)

    def _name_liars(self) -> None:
        """Those of whom nothing is fetched any more, by the name that they had then."""
        for peer, deed in self.content.bad_providers().items():
            if peer in self._liars:
                continue
            self._liars.add(peer)
            advert = self.directory.live().get(peer)
            guest = peer in self.external.configured
            self.health.set(
                "bad-provider",
                peer=f"{advert.name} ({short(peer)})" if advert is not None and advert.name else short(peer),
                deed=deed,
                check="`ipfs repo verify`" if guest else "`meshnode model verify`",
            )

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

    async def _fetch(self, cid: Cid, size: int, *, progress: Progress | None = None) -> None:
        await self.content.fetch(FileRef(cid=cid, size=size), progress=progress)

    async def _reveal(self, cid: Cid) -> OpenFile:
        revealed = await self.parts.workers.run(self.store.reveal, cid)
        if revealed is None:
            raise ContentUnavailable(f"the file {cid} was removed while it was being opened; ask again", cid=cid)
        return revealed

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

    @property
    def why_none(self) -> str:
        node = self._node
        head = node.directory.announcement()
        if head is not None:
            return f"the description of the model {head.name} has not arrived yet"
        if (manifest := node.arrival.awaited) is not None:
            return f"the manifest {manifest} of the model that was added here has not arrived yet"
        return "the network serves no model yet; add one with: meshnode model add PATH"
