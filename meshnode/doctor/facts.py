"""Reads the facts that `meshnode doctor` judges. Nothing is changed: a file is made and removed in the data folder,
ports are taken for a moment, and engine processes run on a toy model in the temporary directory."""

from __future__ import annotations

import errno
import os
import platform
import socket
import stat
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, TypedDict

import psutil

import meshnode
from meshnode.activity import Activity, owner_rule
from meshnode.config.settings import Config
from meshnode.core.confinement import landlock, seccomp
from meshnode.core.errors import ConfigError, DiskError, IdentityError
from meshnode.core.paths import Paths
from meshnode.doctor.device_checks import (
    FolderFacts,
    KeyFacts,
    LockFacts,
    MembershipFacts,
    MemoryFacts,
    PortFacts,
    PrivateFile,
)
from meshnode.membership.enrolment import own_standing, restored_trust
from meshnode.membership.identity import Identity
from meshnode.membership.network import founder_path, has_network, load_network, network_path
from meshnode.net.addresses import reachable_hosts
from meshnode.net.swarm_key import load_swarm_key
from meshnode.policy.owner_first import untold
from meshnode.state.database import Database
from meshnode.store.os_files import is_locked
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.membership.trust import ordered_roles
from protocols.multiaddr import Address, address_of, parse_address

REACH_S: Final = 2.0
MAX_REACHED: Final = 8  # peers tried without a running node
_ENGINE: Final = "meshnode.engine.child"
_LIMITS: Final = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class ConfinementMeans(TypedDict):
    """Arguments of `check_confinement`."""

    system: str
    landlock: int
    filtered: bool


def folder_facts(folder: Path) -> FolderFacts:
    try:
        status = folder.stat()
    except FileNotFoundError:
        return FolderFacts(path=str(folder), exists=False)
    except OSError as error:
        return FolderFacts(path=str(folder), exists=True, problem=_reason(error), error=error.errno or 0)
    mode, ours = stat.S_IMODE(status.st_mode), status.st_uid == os.getuid()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"meshnode")
    except OSError as error:
        problem, number = _reason(error), error.errno or 0
        return FolderFacts(path=str(folder), exists=True, mode=mode, problem=problem, error=number, ours=ours)
    return FolderFacts(path=str(folder), exists=True, mode=mode)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(part for part in (folder, *folder.parents) if part.exists())


def used_bytes(content: Path) -> int:
    """Bytes on disk of the model files."""
    total = 0
    for path in content.rglob("*"):
        with suppress(OSError):
            status = path.lstat()
            total += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
    return total


def held_bytes(content: Path) -> int:
    """Bytes of the model files, those being fetched whole, as `content.quota` counts them."""
    total = 0
    for path in (content / "files").glob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total


def swarm_key_problem(config: Config) -> str:
    """Why the file of network.swarm_key can't be used; empty when it can."""
    try:
        load_swarm_key(config.network.swarm_key)
    except ConfigError as error:
        return str(error)
    return ""


def key_facts(folder: Path, passphrase: str | None) -> KeyFacts:
    path = str(Paths(folder).key)
    if not Identity.exists(folder):
        return KeyFacts(path=path, exists=False)
    asked = False

    def answer() -> str:
        nonlocal asked
        asked = True
        return passphrase or ""

    try:
        return KeyFacts(path=path, exists=True, peer=Identity.load(folder, answer).peer_id)
    except IdentityError as error:
        if asked and not passphrase:
            return KeyFacts(path=path, exists=True, sealed=True)
        return KeyFacts(path=path, exists=True, problem=str(error))


def private_files(folder: Path) -> list[PrivateFile]:
    """Those that exist of the files that hold secrets."""
    paths = Paths(folder)
    found = []
    for path in (paths.key, network_path(folder), founder_path(folder), paths.state):
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            problem = "" if os.access(path, os.R_OK) else "permission denied"
        except FileNotFoundError:
            continue
        except OSError as error:
            mode, problem = 0, _reason(error)
        found.append(PrivateFile(path=str(path), mode=mode, problem=problem))
    return found


def membership_facts(folder: Path, peer: str, now_ms: int) -> tuple[MembershipFacts, str, dict[str, int]]:
    """Our membership; what is wrong with the state file ("" for nothing); moments that lie in the past, with what
    they come from. `peer`: of the node key, "" if that is not known."""
    if not has_network(folder):
        return MembershipFacts(exists=False), "", {}
    try:
        membership = load_network(folder)
    except IdentityError as error:
        return MembershipFacts(problem=str(error)), "", {}
    seen = {"the making of the network": membership.network.created_ms}
    trust, problem = membership.trust(), ""
    state = Paths(folder).state
    if state.exists():  # opening it would make it
        try:
            with Database(state) as database:
                trust = restored_trust(membership, database, now_ms)
        except (DiskError, ConfigError) as error:
            problem = str(error)
    try:
        standing = own_standing(membership, trust, now_ms, PeerId(peer) if peer else None)
    except IdentityError as error:
        return MembershipFacts(problem=str(error)), problem, seen
    seen["our own certificate"] = standing.certificate.issued_ms
    facts = MembershipFacts(
        network=membership.network.name, roles=ordered_roles(standing.roles), expires_ms=standing.expires_ms
    )
    return facts, problem, seen


def file_times(folder: Path) -> dict[str, int]:
    """When the software and the files of the node were last written, UTC milliseconds."""
    paths = Paths(folder)
    found = {}
    for path in (Path(meshnode.__file__), paths.key, paths.state, paths.lock, paths.config):
        with suppress(OSError):
            found[f"the file {path}"] = int(path.stat().st_mtime * 1000)
    return found


def port_facts(config: Config, node_pid: int | None) -> list[PortFacts]:
    """The listen addresses; those that take any free port are left out."""
    wanted = {(address.host, address.port): address for address in listeners(config) if address.port > 0}
    owners = _listening() if wanted else {}
    return [_port(address, owners.get(address.port), node_pid) for address in wanted.values()]


def ports_of_node(pid: int | None, addresses: Sequence[str]) -> list[PortFacts]:
    """What a running node listens on: as the system tells, else the addresses that the node names."""
    with suppress(psutil.Error, OSError):
        found = {
            str(address_of(c.laddr.ip, c.laddr.port))
            for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.pid is not None and c.pid == pid
        }
        addresses = sorted(found) or addresses
    named = [text.partition("/p2p/")[0] for text in addresses]
    return [PortFacts(address=text, ours=True) for text in named]


def hosts_of_node(addresses: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of the addresses that a running node names: the IP addresses, and those with a name instead."""
    known = [parse_address(text.partition("/p2p/")[0]) for text in addresses]
    hosts = [address.host for address in known if address.kind in ("ip4", "ip6")]
    return list(dict.fromkeys(hosts)), [str(address) for address in known if address.host not in hosts]


def listeners(config: Config) -> list[Address]:
    return [parse_address(text) for text in config.network.listen]


def _port(address: Address, owner: int | None, node_pid: int | None) -> PortFacts:
    family = socket.AF_INET6 if address.kind == "ip6" else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the node does
            if family == socket.AF_INET6:
                trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            trial.bind((address.host, address.port))
            trial.listen()
    except OSError as error:
        # The system tells other users' processes from ours only by hiding them.
        ours = node_pid is not None and owner in (node_pid, None) and error.errno == errno.EADDRINUSE
        return PortFacts(
            address=str(address),
            ours=ours,
            owner=_program(owner),
            problem=_reason(error),
            elsewhere=error.errno == errno.EADDRNOTAVAIL,
        )
    return PortFacts(address=str(address))


def _listening() -> dict[int, int | None]:
    """Process ids by TCP port that is listened on, where the system tells."""
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return {}
    return {c.laddr.port: c.pid for c in connections if c.status == psutil.CONN_LISTEN}


def _program(pid: int | None) -> str:
    if pid is None:
        return ""
    with suppress(psutil.Error):
        return f"{psutil.Process(pid).name()} (process {pid})"
    return f"process {pid}"


def hosts(config: Config) -> list[str]:
    """IP addresses under which the listeners can be dialled."""
    return list(dict.fromkeys(host for address in listeners(config) for host in reachable_hosts(address.host)))


def memory_facts(config: Config, *, running: bool) -> MemoryFacts:
    memory = psutil.virtual_memory()
    return MemoryFacts(
        wanted=config.serve.memory.of(memory.available),
        available=memory.available,
        total=memory.total,
        limit=_limit(memory.total),
        running=running,
    )


def _limit(total: int) -> int | None:
    """What the control group allows, if that is less than the device has."""
    for name in _LIMITS:
        with suppress(OSError, ValueError):
            limit = int(Path(name).read_text())  # "max" where there is none
            return limit if limit < total else None
    return None


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def owner_facts(config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Settings of `[owner]` of which this system tells nothing, and those that somebody has set."""
    return untold(Activity().read(), owner_rule(config.owner)), tuple(config.origins)


def lock_facts(folder: Path) -> LockFacts:
    """All but whether a node answers."""
    paths = Paths(folder)
    try:
        held = is_locked(paths.lock)
    except OSError:
        held = False  # not ours to read; `private_files` and `folder_facts` say so
    return LockFacts(
        lock=str(paths.lock),
        held=held,
        holder=_holder(paths.lock) if held else None,
        socket_left=paths.control_socket.exists(),
        orphans=tuple(_orphans()),
    )


def _holder(path: Path) -> int | None:
    """The process that holds a lock on a file, where /proc tells."""
    with suppress(OSError, ValueError):
        inode = str(path.stat().st_ino)
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1:2] == ["FLOCK"] and words[5].rpartition(":")[2] == inode and int(words[4]) > 0:
                return int(words[4])
    return None


def _orphans() -> Iterator[int]:
    """Engine processes of this user whose node is gone."""
    for process in psutil.process_iter(["cmdline", "uids"]):
        words, uids = process.info["cmdline"] or [], process.info["uids"]
        if _ENGINE in words and uids is not None and uids.real == os.getuid():
            parent = words[-1]
            if parent.isdigit() and not psutil.pid_exists(int(parent)):
                yield process.pid


def open_file_limits() -> tuple[int, int]:
    """Soft and hard limit of open files."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = 1 << 20
    return (
        endless if soft == resource.RLIM_INFINITY else soft,
        endless if hard == resource.RLIM_INFINITY else hard,
    )


def confinement_means() -> ConfinementMeans:
    """What this system has for confining processes."""
    return {"system": platform.system(), "landlock": landlock.abi(), "filtered": seccomp.known_processor()}


def can_publish() -> bool:
    """Whether torch and transformers are installed; neither is imported."""
    from importlib.util import find_spec

    return all(find_spec(name) is not None for name in ("torch", "transformers"))


def peers_to_reach(config: Config, folder: Path) -> list[str]:
    """Addresses of the bootstrap peers, and one of each peer met before."""
    found = list(config.network.bootstrap)
    state = Paths(folder).state
    if state.exists():
        with suppress(DiskError, ConfigError), Database(state) as database:
            found += [addresses[0] for addresses in database.known_peers().values() if addresses]
    return list(dict.fromkeys(found))[:MAX_REACHED]


def reach(addresses: Sequence[str]) -> list[tuple[str, str]]:
    """Try a TCP connection to each: (address without its peer id, why it failed or "")."""
    if not addresses:
        return []
    with ThreadPoolExecutor(len(addresses)) as pool:
        return list(pool.map(_reach, addresses))


def _reach(text: str) -> tuple[str, str]:
    try:
        address = parse_address(text)
        with socket.create_connection((address.host, address.port), REACH_S):
            return text.partition("/p2p/")[0], ""
    except RemoteProtocolError as error:
        return text, str(error)
    except OSError as error:
        return text.partition("/p2p/")[0], _reason(error)


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {REACH_S:.0f} s"
    return (error.strerror or str(error)).lower()
