"""What we know of one network of DHT peers: where to begin, who is near what, and which addresses may be dialled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from meshnode.core.errors import ConfigError
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.kad.address import peer_bytes
from protocols.kad.lookup import K
from protocols.kad.messages import MAX_ADDRESSES, Peer, place
from protocols.kad.network import AMINO, LAN, LAN_HERE, DhtNetwork, network_of
from protocols.kad.table import Table


class KnownNetwork:
    """One DHT network, as we know it."""

    def __init__(self, network: DhtNetwork, our_id: PeerId) -> None:
        self.name = network.name
        self.protocol = network.protocol
        self.takes = network.takes
        self.seeds: dict[PeerId, Peer] = {}
        self.table = Table(our_id)

    def start_from(self, key: bytes) -> tuple[Peer, ...]:
        """The peers to ask first."""
        nearest = self.table.nearest(place(key))
        return nearest if len(nearest) >= K else tuple({**self.seeds, **{p.id: p for p in nearest}}.values())

    def dialable(self, peers: Iterable[Peer]) -> tuple[Peer, ...]:
        """The same peers with those addresses alone that may be dialled on a stranger's word."""
        return tuple(Peer(peer.id, tuple(filter(self.takes, peer.addresses))) for peer in peers)


def networks_of(seeds: Iterable[str], our_id: PeerId) -> list[KnownNetwork]:
    """The networks that these multiaddrs lead into, each with its seeds.

    Raises ConfigError for a seed whose peer id is not one."""
    networks = {seed: network_of(seed) for seed in seeds}
    local = LAN_HERE if LAN_HERE in networks.values() else LAN
    out: dict[str, KnownNetwork] = {}
    for seed, network in networks.items():
        where, _, name = seed.rpartition("/p2p/")
        try:
            peer_bytes(PeerId(name))
        except RemoteProtocolError as error:
            raise ConfigError(f"content.dht: {seed}: {error}.") from error
        known = out.setdefault(network.protocol, KnownNetwork(AMINO if network is AMINO else local, our_id))
        before = known.seeds.get(PeerId(name), Peer(PeerId(name)))
        known.seeds[before.id] = replace(before, addresses=(*before.addresses, where)[:MAX_ADDRESSES])
    return list(out.values())
