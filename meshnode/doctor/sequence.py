"""Every check of one device, in the order in which things have to be right."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Final

from meshnode import __version__
from meshnode.api.messages import Status
from meshnode.client import Client
from meshnode.config.settings import Config
from meshnode.core.clock import wall_ms
from meshnode.core.errors import ConfigError, NotRunning
from meshnode.core.paths import Paths
from meshnode.doctor import child_checks as child
from meshnode.doctor import device_checks as device
from meshnode.doctor import facts
from meshnode.doctor import status_checks as node
from meshnode.doctor.device_checks import LockFacts
from meshnode.doctor.finding import Finding, Level
from meshnode.engine.trial import try_engines
from meshnode.store.eviction import RESERVE_BYTES
from meshnode.text.trial import try_text_now
from protocols.errors import MeshError

STATUS_S: Final = 5.0


def examine(folder: Path, read_config: Callable[[], Config], passphrase: str | None) -> Iterator[Finding]:
    """Look at a data folder, its device and its node, which may run or not; each finding as soon as it is there.

    Args:
      read_config: reads the settings; raises ConfigError.
      passphrase: of the node key, if it is known.
    """
    yield device.check_python(sys.version_info[:3])
    config, problem = _config(folder, read_config)
    yield device.check_config(str(config.paths.config), exists=config.paths.config.exists(), problem=problem)
    if config.network.swarm_key:
        yield device.check_swarm_key(facts.swarm_key_problem(config))
    lock = facts.lock_facts(folder)
    status, control = _ask(folder, lock.holder)
    lock = replace(lock, answers=control.level is not Level.OK or status is not None)
    now_ms = wall_ms()
    yield from _data_folder(config, lock, passphrase, now_ms)
    yield from _machine(config, lock, status)
    for trial in try_engines():
        yield child.check_engine(trial.kind, took_ms=trial.took_ms, rss=trial.rss_bytes, problem=trial.problem)
        if trial.kind == "onnx" and not trial.problem:
            yield child.check_confinement(child.Confined.ENGINE, trial.confined, **facts.confinement_means())
    text = try_text_now()
    yield child.check_text(text.problem)
    if not text.problem:
        yield child.check_confinement(child.Confined.TEXT, text.confined, **facts.confinement_means())
    yield device.check_publishing(possible=facts.can_publish())
    yield control
    if status is not None:
        yield from node.check_status(status, __version__, now_ms)
    elif not lock.answers:
        for address, why in facts.reach(facts.peers_to_reach(config, folder)):
            yield device.check_reach(address, why)


def _config(folder: Path, read_config: Callable[[], Config]) -> tuple[Config, str]:
    try:
        return read_config(), ""
    except ConfigError as error:
        return Config(paths=Paths(folder)), str(error)


def _ask(folder: Path, holder: int | None) -> tuple[Status | None, Finding]:
    """The status of the running node, and what that means: not OK if somebody listens but gives none."""
    began = perf_counter()
    try:
        status = Client(folder).status(timeout=STATUS_S)
    except NotRunning:
        return None, node.check_control(str(folder), running=False)
    except (MeshError, OSError, ValueError, TypeError) as error:
        return None, node.check_control(str(folder), running=True, problem=str(error), pid=holder)
    return status, node.check_control(str(folder), running=True, took_ms=(perf_counter() - began) * 1000)


def _data_folder(config: Config, lock: LockFacts, passphrase: str | None, now_ms: int) -> Iterator[Finding]:
    paths = config.paths
    about = facts.folder_facts(paths.folder)
    yield device.check_folder(about)
    disk = facts.existing(paths.content)
    free, used = shutil.disk_usage(disk).free, facts.used_bytes(paths.content)
    quota = config.content.quota.of(free + used)
    held = facts.held_bytes(paths.content)
    yield device.check_disk(str(disk), free=free, used=used, held=held, quota=quota, reserve=RESERVE_BYTES)
    if not about.exists:
        return
    key = facts.key_facts(paths.folder, passphrase)
    yield device.check_key(key)
    yield from device.check_private_files(facts.private_files(paths.folder))
    membership, problem, seen = facts.membership_facts(paths.folder, key.peer, now_ms)
    yield device.check_membership(membership, now_ms)
    if paths.state.exists():
        yield device.check_state(str(paths.state), problem)
    yield device.check_clock(now_ms, {**facts.file_times(paths.folder), **seen})
    yield from device.check_lock(lock)


def _machine(config: Config, lock: LockFacts, status: Status | None) -> Iterator[Finding]:
    if status is not None and status.addresses:  # flags of `start` may have set others than the file
        ports = facts.ports_of_node(status.pid, status.addresses)
        hosts, announced = facts.hosts_of_node(status.addresses)
    else:
        ports = facts.port_facts(config, lock.holder if status is None else status.pid)
        hosts, announced = facts.hosts(config), list(config.network.announce)
    for port in ports:
        yield device.check_port(port)
    yield device.check_addresses(hosts, announced)
    yield device.check_memory(facts.memory_facts(config, running=lock.answers))
    yield device.check_cores(min(facts.cores(), config.limits.cores or facts.cores()), config.serve.threads)
    yield device.check_owner(*facts.owner_facts(config))
    yield device.check_open_files(*facts.open_file_limits())
