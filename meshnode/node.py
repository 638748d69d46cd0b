"""The composition root: the only file that knows how a node fits together.

Nesting is the shutdown order: what is opened last is cancelled first.

    ground    network host, content, membership, discovery, guests, directory, pipes
    work      round trips, stage, releases, spans, placement, readiness, inventory, replication, control socket
"""

from __future__ import annotations

import trio

from meshnode import __version__
from meshnode.config.settings import Config
from meshnode.core.log import get_logger
from meshnode.core.supervise import Service, supervise
from meshnode.ipfs.fallback import Fallback
from meshnode.membership.registry import Registry
from meshnode.net.pipes import Pipes
from meshnode.parts import Parts, first_advert
from meshnode.services.content.access import Access
from meshnode.services.content.service import ContentService
from meshnode.services.content.sources import Sources
from meshnode.services.dht import DhtClient, DhtSettings
from meshnode.services.directory.directory import DirectoryService, DirectorySettings, next_incarnation
from meshnode.services.discovery import DiscoveryService
from meshnode.services.external_peers import ExternalPeers, ExternalSettings
from meshnode.services.holds import HoldAnswers, HoldQuestions
from meshnode.services.inference.advertised_load import AdvertisedLoad
from meshnode.services.inference.origin import OriginService
from meshnode.services.inference.readiness import ReadinessService
from meshnode.services.inference.router import Router
from meshnode.services.inference.stage import StageService
from meshnode.services.inference.text import TextService
from meshnode.services.inventory import InventoryService
from meshnode.services.ipfs_daemon import IpfsDaemonService, Publication
from meshnode.services.membership import Introduction, MembershipService
from meshnode.services.placement import PlacementService, PlacementSettings
from meshnode.services.releases import ReleasesService
from meshnode.services.replication.copies import Duties, ReplicationService, ReplicationSettings
from meshnode.services.replication.shelves import Shelves
from meshnode.services.round_trips import RoundTripsService
from meshnode.services.spans import SpansService, SpansSettings
from protocols.bitswap import messages as bitswap
from protocols.membership import messages as membership

_log = get_logger("node")


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
                first=first_advert(parts, config, self.incarnation),
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
        self.releases = ReleasesService(self.directory, self.content, self.store, self.database, self.health)
        self.daemon = None
        if parts.daemon is not None:
            published = self.releases if config.content.ipfs_publish else None
            publication = Publication(
                parts.daemon, self.store, parts.state, self.health, held=self.inventory, releases=published
            )
            self.daemon = IpfsDaemonService(
                parts.daemon, self.host, self.external, self.membership, publication, self.health
            )
        self.pipes = Pipes(self.host)
        self.spans = SpansService(
            self.content,
            self.store,
            parts.engine,
            self.health,
            SpansSettings(
                incarnation=self.incarnation,
                memory_bytes=memory,
                rng=rng,
                kind=config.serve.engine,
                threads=config.serve.threads,
                max_sessions=config.serve.sessions,
                kv_bytes=config.serve.kv_memory.of(memory),
            ),
        )
        self.load = AdvertisedLoad()
        self.placement = PlacementService(
            self.directory,
            self.releases,
            self.spans,
            HoldQuestions(self.host),
            self.load,
            self.health,
            PlacementSettings(
                memory_bytes=memory,
                rng=rng,
                wall=wall,
                max_layers=config.serve.layers,
                max_sessions=config.serve.sessions,
            ),
        )
        HoldAnswers(self.host, self.placement)
        self.stage = StageService(identity.peer_id, self.pipes, self.spans, self.load)
        router = Router(identity.peer_id, self.directory, self.releases)
        self.origin = OriginService(identity.peer_id, self.pipes, router, self.releases, rng)
        self.readiness = ReadinessService(router, self.origin, self.host, self.pipes, self.health)
        self.text = TextService(self.releases, self.content, self.origin, self.readiness, parts.workers)
        self.round_trips = RoundTripsService(self.host, self.directory)
        self.replication = ReplicationService(
            self.directory,
            Shelves(identity.peer_id, self.directory, self.inventory, self.store),
            self.releases,
            self.content,
            Duties(self.spans, self.load),
            ReplicationSettings(replicas=config.content.replicas),
            self.health,
        )
        self.stopping = trio.Event()
        self.ended = trio.Event()

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
                for service in (
                    self.round_trips,
                    self.stage,
                    self.releases,
                    self.spans,
                    self.placement,
                    self.readiness,
                    self.inventory,
                    self.replication,
                    *extra,
                ):
                    await work.start(supervise, service)
                _log.info("node.started", peer=self.identity.peer_id, addresses=self.host.addresses)
                task_status.started()
                await self.stopping.wait()
                _log.info("node.leaving")
                await self.replication.drain()
                await self.placement.drain()
                work.cancel_scope.cancel()
            await self.directory.goodbye()
            ground.cancel_scope.cancel()
        _log.info("node.stopped")
        self.ended.set()
