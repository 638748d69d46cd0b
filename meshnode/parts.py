"""What a node is made of."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from meshnode.config.settings import Config
from meshnode.core.clock import Wall
from meshnode.core.health import Health
from meshnode.core.workers import Workers
from meshnode.engine.port import Engine, StageSpec
from meshnode.ipfs.fallback import Source
from meshnode.ipfs.rpc import IpfsApi
from meshnode.membership.identity import Identity
from meshnode.membership.port import Membership
from meshnode.net.port import Host
from meshnode.state.port import State
from meshnode.store.port import Store
from protocols.advert.messages import Advert


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this device is."""

    name: str  # for people
    free_memory_bytes: int  # at the start
    tags: tuple[str, ...]  # "cpu", "gpu", "mains", "battery"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The adapters. `assemble.py` makes them of real things, `sim/` of things in memory."""

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


def first_advert(parts: Parts, config: Config, incarnation: int) -> Advert:
    """What a node says about itself when it starts; its services fill in the rest."""
    return Advert(
        peer=parts.identity.peer_id,
        incarnation=incarnation,
        sequence=0,
        name=parts.machine.name[:64],
        addresses=(),
        memory_bytes=config.serve.memory.of(parts.machine.free_memory_bytes),
        disk_free_bytes=parts.store.usage().room_bytes,
        max_layers=config.serve.layers,
        tags=parts.machine.tags,
        serving=None,
    )
