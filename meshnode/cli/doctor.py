"""`meshnode doctor`: what is wrong on this device, one line per check, with remedies. A node may run or not."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from meshnode import __version__, client
from meshnode.cli.main import add_data
from meshnode.cli.settings import PASSPHRASE, folder_of, settings
from meshnode.config.settings import Config
from meshnode.core.errors import ConfigError
from meshnode.core.paths import Paths

if TYPE_CHECKING:
    from meshnode.doctor.device import LockFacts
    from meshnode.doctor.finding import Finding

JSON_VERSION: Final = 1
STATUS_SECONDS: Final = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("--json", action="store_true", help="the same findings as JSON (fields may be added)")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 when nothing is wrong, else 1."""
    from meshnode.doctor.finding import exit_code

    found = []
    for finding in examine(arguments):
        found.append(finding)
        if not arguments.json:
            print(line(finding), flush=True)
    if arguments.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        print(f"\n{summary(found)}")
    return exit_code(found)


def line(finding: Finding) -> str:
    """One line for people."""
    return f"{finding.level.value:<8} {finding.check}: {finding.text} {finding.remedy}".rstrip()


def summary(findings: Sequence[Finding]) -> str:
    """The last line."""
    counts = _counts(findings)
    bad, odd = counts["wrong"], counts["warning"]
    warnings = f"{odd} warning{'' if odd == 1 else 's'}"
    if bad:
        return f"{bad} thing{' is' if bad == 1 else 's are'} wrong, {warnings}."
    return f"Nothing is wrong, {warnings}."


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """`{version, wrong, warning, ok, checks: [{check, level, text, remedy}]}`."""
    checks = [{"check": f.check, "level": f.level.value, "text": f.text, "remedy": f.remedy} for f in findings]
    return {"version": JSON_VERSION, **_counts(findings), "checks": checks}


def _counts(findings: Sequence[Finding]) -> dict[str, int]:
    from meshnode.doctor.finding import Level

    return {level.value: sum(f.level is level for f in findings) for level in reversed(Level)}


def examine(arguments: argparse.Namespace) -> Iterator[Finding]:
    """Every check, in the order in which things have to be right; each is given out as soon as it is done."""
    from meshnode.core.clock import wall_ms
    from meshnode.doctor import device, facts
    from meshnode.doctor.finding import Level

    folder = folder_of(arguments)
    yield device.check_python(sys.version_info[:3])
    config, problem = _config(arguments, folder)
    yield device.check_config(str(config.paths.config), exists=config.paths.config.exists(), problem=problem)
    if config.network.swarm_key:
        yield device.check_swarm_key(facts.swarm_key_problem(config))
    lock = facts.lock_facts(folder)
    status, node = _node(folder, lock.holder)
    lock = replace(lock, answers=node.level is not Level.OK or status is not None)
    yield from _data_folder(config, folder, lock, wall_ms())
    yield from _machine(config, lock, status)
    yield from _engine()
    yield node
    if status is not None:
        yield from _running(status, wall_ms())
    elif not lock.answers:
        yield from _reach(config, folder)


def _config(arguments: argparse.Namespace, folder: Path) -> tuple[Config, str]:
    try:
        return settings(arguments), ""
    except ConfigError as error:
        return Config(paths=Paths(folder)), str(error)


def _node(folder: Path, holder: int | None) -> tuple[dict[str, Any] | None, Finding]:
    """The status of the running node, and what that means: not OK if somebody listens but gives none."""
    from meshnode.doctor.node import check_control

    began = perf_counter()
    try:
        status = client.ask_one(folder, {"do": "status"}, seconds=STATUS_SECONDS)
    except client.NotRunning:
        return None, check_control(str(folder), running=False)
    except (client.NodeError, OSError, ValueError) as error:
        return None, check_control(str(folder), running=True, problem=str(error), pid=holder)
    return status, check_control(str(folder), running=True, took_ms=(perf_counter() - began) * 1000)


def _data_folder(config: Config, folder: Path, lock: LockFacts, now_ms: int) -> Iterator[Finding]:
    from meshnode.doctor import device, facts
    from meshnode.store.blob_store import RESERVE_BYTES

    paths = config.paths
    about = facts.folder_facts(folder)
    yield device.check_folder(about)
    disk = facts.existing(paths.content)
    free, used = shutil.disk_usage(disk).free, facts.used_bytes(paths.content)
    quota = config.content.quota.of(free + used)
    held = facts.held_bytes(paths.content)
    yield device.check_disk(str(disk), free=free, used=used, held=held, quota=quota, reserve=RESERVE_BYTES)
    if not about.exists:
        return
    key = facts.key_facts(folder, os.environ.get(PASSPHRASE))
    yield device.check_key(key)
    yield from device.check_private_files(facts.private_files(folder))
    membership, problem, seen = facts.membership_facts(folder, key.peer, now_ms)
    yield device.check_membership(membership, now_ms)
    if paths.state.exists():
        yield device.check_state(str(paths.state), problem)
    yield device.check_clock(now_ms, {**facts.file_times(folder), **seen})
    yield from device.check_lock(lock)


def _machine(config: Config, lock: LockFacts, status: dict[str, Any] | None) -> Iterator[Finding]:
    from meshnode.doctor import device, facts

    if status is not None and status.get("addresses"):  # flags of `start` may have set others than the file
        ports = facts.ports_of_node(status.get("pid"), status["addresses"])
        hosts, announced = facts.hosts_of_node(status["addresses"])
    else:
        ports = facts.port_facts(config, lock.holder if status is None else status.get("pid"))
        hosts, announced = facts.hosts(config), list(config.network.announce)
    for port in ports:
        yield device.check_port(port)
    yield device.check_addresses(hosts, announced)
    yield device.check_memory(facts.memory_facts(config, running=lock.answers))
    yield device.check_cores(facts.cores(), config.serve.threads)
    yield device.check_open_files(*facts.open_file_limits())


def _engine() -> Iterator[Finding]:
    from meshnode.doctor import device
    from meshnode.doctor.facts import can_publish
    from meshnode.engine.trial import try_engines

    for trial in try_engines():
        yield device.check_engine(trial.kind, took_ms=trial.took_ms, rss=trial.rss_bytes, problem=trial.problem)
    yield device.check_publishing(possible=can_publish())


def _running(status: dict[str, Any], now_ms: int) -> Iterator[Finding]:
    from meshnode.doctor import node

    yield node.check_version(status, __version__)
    yield from node.check_unreachable(status)
    yield from node.check_links(status)
    yield from node.check_refusals(status, now_ms)
    yield node.check_readiness(status)
    yield from node.check_health(status)


def _reach(config: Config, folder: Path) -> Iterator[Finding]:
    from meshnode.doctor import facts
    from meshnode.doctor.device import check_reach

    for address, problem in facts.reach(facts.peers_to_reach(config, folder)):
        yield check_reach(address, problem)
