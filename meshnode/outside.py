"""The services of a node that deal with those outside its network, and with the local one: IPFS peers, the DHT, an
operator's daemon, members nearby."""

from __future__ import annotations

from meshnode.config.settings import Config
from meshnode.membership.rights import Rights
from meshnode.parts import Parts
from meshnode.services.dht.client import DhtClient, DhtSettings
from meshnode.services.directory.directory import DirectoryService
from meshnode.services.external_peers import ExternalPeers, ExternalSettings
from meshnode.services.inventory import InventoryService
from meshnode.services.ipfs_daemon import IpfsDaemonService, Publication
from meshnode.services.local_discovery import LocalDiscovery
from meshnode.services.membership import MembershipService
from meshnode.services.port import Owner
from meshnode.services.releases import ReleasesService
from meshnode.services.upstream import UpstreamService
from protocols.bitswap import messages as bitswap
from protocols.membership import messages as membership


def _shares_with_anyone(config: Config) -> bool:
    return config.content.share == "anyone"


def external_peers(parts: Parts, config: Config) -> ExternalPeers:
    return ExternalPeers(
        parts.host,
        ExternalSettings(
            addresses=config.content.ipfs_peers,
            protocols=(bitswap.PROTOCOL,),
            offers=(bitswap.PROTOCOL,) if _shares_with_anyone(config) else (),
            entrance=membership.PROTOCOL,
        ),
        parts.rng,
        health=parts.health,
    )


def upstream_service(parts: Parts, config: Config, directory: DirectoryService, rights: Rights) -> UpstreamService:
    """Offers what the owner has named of a server of its own, and asks for what others offer."""
    models = config.serve.upstream_models
    return UpstreamService(parts.host, directory, directory.notices, rights, parts.upstream, models)


def local_discovery(parts: Parts, members: MembershipService) -> LocalDiscovery | None:
    """None: the owner does not want members on the local network to be looked for."""
    if parts.local_network is None:
        return None
    return LocalDiscovery(parts.host, parts.local_network, members, parts.rng)


def dht_client(
    parts: Parts, config: Config, external: ExternalPeers, members: MembershipService, inventory: InventoryService
) -> DhtClient | None:
    """None: the owner has named no DHT peers."""
    if not config.content.dht:
        return None
    return DhtClient(
        parts.host,
        external,
        members,
        DhtSettings(seeds=config.content.dht, protocols=(bitswap.PROTOCOL,)),
        parts.rng,
        shared=inventory if _shares_with_anyone(config) else None,
        health=parts.health,
    )


def ipfs_daemon(
    parts: Parts,
    config: Config,
    external: ExternalPeers,
    members: MembershipService,
    inventory: InventoryService,
    releases: ReleasesService,
    owner: Owner,
) -> IpfsDaemonService | None:
    """None: the owner has named no daemon."""
    if parts.daemon is None:
        return None
    published = releases if config.content.ipfs_publish else None
    publication = Publication(
        parts.daemon, parts.store, parts.state, parts.health, held=inventory, releases=published, owner=owner
    )
    return IpfsDaemonService(parts.daemon, parts.host, external, members, publication, parts.health)
