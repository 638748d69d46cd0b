"""What a node is made of."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meshnode.config.settings import Config
from meshnode.core.clock import Wall
from meshnode.core.health import Health
from meshnode.core.tracing import NoTracer, Tracer
from meshnode.core.workers import Workers
from meshnode.engine.port import Engine, StageSpec
from meshnode.ipfs.rpc import IpfsApi
from meshnode.ipfs.source_order import Source
from meshnode.membership.identity import Identity
from meshnode.membership.port import Membership
from meshnode.net.port import Host, LocalNetwork
from meshnode.policy.idle import DeviceFacts
from meshnode.state.audit import Audit
from meshnode.state.port import State
from meshnode.state.samples_port import SampleBuffer
from meshnode.store.port import Store
from meshnode.text.port import OpenTokenizer
from protocols.advert.messages import Advert

if TYPE_CHECKING:
    from meshnode.services.upstream import Server
    from meshnode.state.private_steps import PrivateSteps
    from meshnode.trainer.port import Trainer


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
    local_network: LocalNetwork | None  # where members nearby are looked for; None: nowhere
    store: Store
    state: State
    samples: SampleBuffer
    trainer: Trainer | None  # None: this device does not learn
    private: PrivateSteps | None  # None: training is not differentially private
    activity: Callable[[], DeviceFacts]  # how busy this device is with everything but its training
    device: Callable[[], DeviceFacts]  # with everything but this node
    learned: Path  # folder of what was learned here
    engine: Callable[[StageSpec], Engine]  # a new engine for a span
    tokenizer: OpenTokenizer  # opens that of a model
    upstream: Server | None  # of the owner's own, whose models are offered by name
    audit: Audit  # where is noted what the node is asked for
    sources: tuple[Source, ...]  # asked for what no peer gives, in this order
    daemon: IpfsApi | None  # the operator's own, one of the sources
    machine: Machine
    health: Health
    wall: Wall
    rng: random.Random
    tracer: Tracer = NoTracer()  # who keeps spans of questions
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
