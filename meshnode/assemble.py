"""A node's parts, made of real things: files, sockets, processes. The only file that knows every adapter."""

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil

from meshnode.activity import Activity, our_processes
from meshnode.config.settings import Config
from meshnode.core.clock import monotonic, wall_ms
from meshnode.core.errors import ConfigError
from meshnode.core.health import Health
from meshnode.core.paths import PUBLISH_PREFIX
from meshnode.core.tracing import NoTracer, Tracer
from meshnode.core.workers import Threads
from meshnode.engine.process import EngineProcess
from meshnode.ipfs.gateway import Gateway
from meshnode.ipfs.rpc import IpfsApi
from meshnode.membership.identity import Identity
from meshnode.membership.network import load_network
from meshnode.net.libp2p.host import Libp2pHost
from meshnode.net.multicast import Multicast
from meshnode.net.swarm_key import load_swarm_key
from meshnode.parts import Machine, Parts
from meshnode.policy.idle import DeviceFacts
from meshnode.state.audit import Audit, AuditLog, NoAudit
from meshnode.state.budget import Budget, Limit
from meshnode.state.database import Database
from meshnode.state.open_samples import open_samples
from meshnode.state.private_steps import PrivateSteps
from meshnode.state.sealing import samples_key
from meshnode.store.cipher import Cipher
from meshnode.store.open import open_store
from meshnode.store.os_files import remove_abandoned
from meshnode.text.process import open_tokenizer
from meshnode.upstream.server import UpstreamServer

if TYPE_CHECKING:
    from meshnode.trainer.process import TrainerProcess


def assemble(config: Config, identity: Identity, stack: ExitStack) -> Parts:
    """Open the data folder's files (closed by `stack`) and make every part; nothing runs yet.

    Raises FatalError: the folder is in use, no membership, no room.
    """
    paths = config.paths
    _lock(paths.lock, stack)
    membership = load_network(paths.folder)
    database = stack.enter_context(Database(paths.state))
    remove_abandoned(paths.cache, PUBLISH_PREFIX)
    cipher = partial(Cipher, identity.seed, membership.network_id)
    content = config.content
    store = stack.enter_context(open_store(paths.content, content.quota, cipher, encrypt=content.encrypt))
    learn = config.learn
    key = partial(samples_key, identity.seed, membership.network_id)
    samples = stack.enter_context(
        open_samples(paths.samples, learn.max_samples, learn.max_size, key, encrypt=content.encrypt)
    )
    trainer = trainer_of(config)
    name = config.node.name or membership.name or os.uname().nodename
    health = Health(monotonic)
    daemon = IpfsApi(config.content.ipfs_api, health) if config.content.ipfs_api else None
    gateways = tuple(Gateway(url, health) for url in config.content.gateways)
    return Parts(
        identity=identity,
        membership=membership,
        host=Libp2pHost(
            identity.seed,
            config.network.listen,
            announce=config.network.announce,
            swarm_key=load_swarm_key(config.network.swarm_key),
        ),
        local_network=Multicast() if config.network.local_discovery else None,
        store=store,
        state=database,
        samples=samples,
        trainer=trainer,
        private=private_steps_of(config, stack),
        activity=activity_of(trainer),
        device=device_facts(),
        learned=paths.learned,
        engine=EngineProcess,
        tokenizer=open_tokenizer,
        upstream=UpstreamServer(config.serve.upstream) if config.serve.upstream else None,
        audit=audit_of(config, database, health),
        sources=gateways if daemon is None else (daemon, *gateways),
        daemon=daemon,
        machine=this_machine(name),
        health=health,
        wall=wall_ms,
        rng=random.Random(os.urandom(16)),
        workers=Threads(),
        tracer=tracer_of(config, name, identity, stack),
    )


def tracer_of(config: Config, name: str, identity: Identity, stack: ExitStack) -> Tracer:
    """Who keeps spans. Raises ConfigError: the extra for that is missing."""
    if not config.trace.otlp:
        return NoTracer()
    from meshnode.otlp import open_tracer  # brings OpenTelemetry

    return open_tracer(config.trace.otlp, name, identity.peer_id, stack)


def trainer_of(config: Config) -> TrainerProcess | None:
    """What trains here; nothing starts yet. None when the owner does not want that."""
    if not config.learn.enabled:
        return None
    from meshnode.trainer.process import TrainerProcess  # brings numpy, which a node that only serves does not need

    return TrainerProcess()


def private_steps_of(config: Config, stack: ExitStack) -> PrivateSteps | None:
    """None when the owner does not ask for differential privacy. Raises DiskError."""
    learn = config.learn
    if not (learn.enabled and learn.epsilon):
        return None
    budget = stack.enter_context(Budget(config.paths.privacy))
    return PrivateSteps(budget, Limit(epsilon=learn.epsilon, delta=learn.delta), learn.privacy_steps)


def activity_of(trainer: TrainerProcess | None) -> Callable[[], DeviceFacts]:
    """How busy this device is with everything but its training."""
    activity = Activity()

    def read() -> DeviceFacts:
        return activity.read(() if trainer is None else trainer.pids)

    return read


def device_facts() -> Callable[[], DeviceFacts]:
    """How busy this device is with everything but this node."""
    activity = Activity()
    return lambda: activity.read(our_processes())


def audit_of(config: Config, state: Database, health: Health) -> Audit:
    """Where is noted what the node is asked for, if the owner wants that."""
    settings, folder = config.audit, config.paths.folder
    if not settings.enabled:
        return NoAudit()
    size = settings.max_size.of(os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize)
    return AuditLog(folder, state, wall_ms, health, max_bytes=size, files=settings.files, text=settings.text)


def this_machine(name: str) -> Machine:
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    power = () if battery is None else ("mains",) if battery.power_plugged else ("battery",)
    return Machine(
        name=name,
        free_memory_bytes=psutil.virtual_memory().available,
        tags=("cpu", *power),
    )


def _lock(path: Path, stack: ExitStack) -> None:
    """One node per data folder. The lock goes with the process."""
    file: IO[str] = stack.enter_context(path.open("a"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigError(
            f"a node already runs in the data folder {path.parent}; stop it, or choose another folder with --data"
        ) from error
