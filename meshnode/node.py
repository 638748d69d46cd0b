"""The composition root: the only file that knows how a node fits together.

Nesting is the shutdown order: what is opened last is cancelled first.

    ground    network host, content, membership, discovery, guests, directory, pipes
    work      what answers, learns, places and keeps; the control socket and the HTTP door
"""

from __future__ import annotations

from dataclasses import replace

import trio

from meshnode import __version__, outside
from meshnode.activity import owner_rule
from meshnode.config.settings import Config
from meshnode.core.log import get_logger
from meshnode.core.supervise import Service, supervise
from meshnode.ipfs.source_order import Fallback
from meshnode.learning import learning_service, rollout_service
from meshnode.membership.pairing import PairingTickets
from meshnode.membership.registry import Registry
from meshnode.membership.rights import Rights
from meshnode.net.pipes import Pipes
from meshnode.parts import Parts, first_advert
from meshnode.services.content.access import Access
from meshnode.services.content.service import ContentService
from meshnode.services.content.sources import Sources
from meshnode.services.dialling import DiallingService
from meshnode.services.directory.author import next_incarnation
from meshnode.services.directory.directory import DirectoryService, DirectorySettings
from meshnode.services.holds import HoldAnswers, HoldQuestions
from meshnode.services.inference.adapters import AdapterService
from meshnode.services.inference.advertised_load import AdvertisedLoad
from meshnode.services.inference.grammars import GrammarService
from meshnode.services.inference.origin import OriginService
from meshnode.services.inference.readiness import ReadinessService
from meshnode.services.inference.router import Router
from meshnode.services.inference.stage import StageService
from meshnode.services.inference.text import TextService
from meshnode.services.inventory import InventoryService
from meshnode.services.membership import Introduction, MembershipService
from meshnode.services.owner import OwnerService
from meshnode.services.pairing import PairingService
from meshnode.services.placement.service import OurStage, PlacementService
from meshnode.services.releases import ReleasesService
from meshnode.services.replication.copies import Duties, ReplicationService, ReplicationSettings
from meshnode.services.replication.shelves import Shelves
from meshnode.services.round_trips import RoundTripsService
from meshnode.services.samples import SamplesService
from meshnode.services.spans import SpansService
from meshnode.serving import placement_settings, spans_settings
from meshnode.state.address_book import AddressBook
from protocols.advert.messages import Advert
from protocols.membership.messages import SERVE

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
        self.external = outside.external_peers(parts, config)
        self.membership = MembershipService(
            self.host,
            Registry(identity, parts.membership, parts.state, wall),
            self.external,
            self.health,
            wall,
            Introduction(name=parts.machine.name, software=__version__),
        )
        tickets = PairingTickets(parts.membership, parts.state, lambda: self.host.addresses, wall)
        self.pairing = PairingService(self.host, tickets)
        self.rights = Rights(self.membership.roles_of, self.health)
        self.directory = DirectoryService(
            self.host,
            identity,
            self.membership,
            self.database,
            self.health,
            wall,
            DirectorySettings(
                topic=f"/meshnode/records/{self.membership_file.network_id}",
                first=self._first_advert(),
                rng=rng,
            ),
        )
        self.owner = OwnerService(self.directory, self.database, wall, parts.device, owner_rule(config.owner))
        self.upstream = outside.upstream_service(parts, config, self.directory, self.rights)
        self.nearby = outside.local_discovery(parts, self.membership)
        self.dialling = DiallingService(
            self.host,
            AddressBook(self.database, config.network.bootstrap, wall, self.membership.was_put_out),
            self.directory,
            self.health,
            rng,
            self.nearby,
        )
        self.inventory = InventoryService(self.directory, self.store, self.health)
        self.dht = outside.dht_client(parts, config, self.external, self.membership, self.inventory)
        fallback = Fallback(parts.sources) if parts.sources else None
        self.content = ContentService(
            self.host,
            self.store,
            self.directory,
            Sources(self.host, self.directory, self.external, finder=self.dht, outside=fallback),
            Access(config.content.share, self.membership, self.external, config.limits.upload),
            self.health,
            parts.workers,
        )
        self.releases = ReleasesService(
            self.directory, self.content, self.store, self.database, self.inventory, self.health
        )
        self.daemon = outside.ipfs_daemon(
            parts, config, self.external, self.membership, self.inventory, self.releases, self.owner
        )
        self.pipes = Pipes(self.host)
        self.host.on_flood(lambda peer, protocol: self.health.set("too-fast", peer=peer, what=protocol))
        self.pipes.flooded = lambda peer: self.health.set("too-fast", peer=peer, what="steps of questions")
        self.spans = SpansService(
            self.content,
            self.store,
            parts.engine,
            self.health,
            spans_settings(parts, config, lambda: self.directory.me().incarnation),
        )
        self.load = AdvertisedLoad()
        self.placement = PlacementService(
            self.directory,
            self.releases,
            OurStage(self.spans, self.load, self.owner),
            HoldQuestions(self.host),
            self.rights,
            self.health,
            placement_settings(parts, config),
        )
        HoldAnswers(self.host, self.placement, self.rights)
        self.learning = learning_service(
            parts, config, self.directory, self.content, self.membership, self.rights, self.load, self.owner
        )
        self.rollout = rollout_service(
            parts, config, self.directory, self.membership, self.releases, judge=self.learning
        )
        self.learning.propose_to(self.rollout)
        self.adapters = AdapterService(self.content, self.spans, self.rollout)
        self.grammars = GrammarService(self.releases, self.content, parts.tokenizer)
        us = identity.peer_id
        self.stage = StageService(
            us,
            self.pipes,
            self.spans,
            self.load,
            self.rights,
            self.adapters,
            self.grammars,
            prefix_cache=config.serve.prefix_cache,
            tracer=parts.tracer,
        )
        self.stage.taken = lambda peer: self.parts.audit.note("mesh", peer, "layers for an answer")
        router = Router(us, self.directory, self.releases, self.health)
        self.origin = OriginService(us, self.pipes, router, self.releases, self.rollout, self.rights, rng)
        self.readiness = ReadinessService(router, self.origin, self.host, self.pipes, self.health)
        self.text = TextService(self.releases, self.content, self.origin, self.readiness, rng, parts.tokenizer)
        self.samples = SamplesService(parts.samples, self.text, self.health, wall, keep=config.learn.keep_answers)
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

    def _first_advert(self) -> Advert:
        """What we say about ourselves from the start: who may not serve promises no memory."""
        advert = first_advert(self.parts, self.config, self.incarnation)
        return advert if self.rights.has(self.identity.peer_id, SERVE) else replace(advert, memory_bytes=0)

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
                self.dialling,
                self.external,
                self.pipes,
                *self.parts.sources,
                *(one for one in (self.nearby, self.dht, self.daemon) if one is not None),
            ):
                await ground.start(supervise, below)
            async with trio.open_nursery() as work:
                for service in (
                    self.owner,
                    self.upstream,
                    self.round_trips,
                    self.rollout,
                    self.adapters,
                    self.grammars,
                    self.stage,
                    self.origin,
                    self.releases,
                    self.spans,
                    self.placement,
                    self.readiness,
                    self.inventory,
                    self.replication,
                    self.text,
                    self.samples,
                    self.learning,
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
