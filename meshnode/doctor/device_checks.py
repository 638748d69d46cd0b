"""What can be wrong with a device before a node runs on it: each check takes facts and gives findings.

Nothing is read here; `meshnode/doctor/facts.py` collects the facts. Sizes are bytes, times UTC milliseconds.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from meshnode.core.sizes import counted, format_size
from meshnode.doctor.finding import Finding, ok, warning, wrong

PYTHON: Final = ((3, 11), (3, 14))  # from, below
SOON_MS: Final = 7 * 86_400_000  # a membership that ends sooner is worth a word
CLOCK_WRONG_MS: Final = 600_000  # as `protocols/membership` draws the line
CLOCK_ODD_MS: Final = 60_000  # file systems round, and networks of files have clocks of their own
OVERHEAD_BYTES: Final = 250_000_000  # network process and engine, beside weights and KV
LEAST_BYTES: Final = 64_000_000  # below it hardly a layer of any model fits
FEW_FILES: Final = 256
ENOUGH_FILES: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFacts:
    """The data folder. `problem`: why nothing can be written there, empty when it can; `error`: its errno."""

    path: str
    exists: bool
    mode: int = 0o700
    problem: str = ""
    error: int = 0
    ours: bool = True  # this user owns it


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFacts:
    """The node key. `problem`: the sentence of what is wrong with it; `sealed`: its passphrase was not given."""

    path: str
    exists: bool
    peer: str = ""
    sealed: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateFile:
    """A file that only its owner may read. `problem`: why it can't be read, empty when it can."""

    path: str
    mode: int = 0o600
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipFacts:
    """Our place in a network. `problem`: the sentence that says why it does not hold."""

    exists: bool = True
    network: str = ""
    roles: tuple[str, ...] = ()
    expires_ms: int = 0  # 0: never
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortFacts:
    """A TCP endpoint that the node wants. `problem`: why it can't be had; `owner`: the program that has it."""

    address: str
    ours: bool = False  # our own running node has it
    owner: str = ""
    problem: str = ""
    elsewhere: bool = False  # no interface of this machine has the address


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFacts:
    """`wanted`: what serve.memory comes to; `limit`: of the container or service, if there is one."""

    wanted: int
    available: int
    total: int
    limit: int | None = None
    running: bool = False  # a running node has taken its part of `available` already


@dataclass(frozen=True, slots=True, kw_only=True)
class LockFacts:
    """What is left of nodes in the data folder."""

    lock: str
    held: bool = False
    holder: int | None = None  # process id, where the system tells
    answers: bool = False  # a node answers on the control socket
    socket_left: bool = False  # the socket's file exists
    orphans: tuple[int, ...] = ()  # engine processes whose node is gone


def check_python(version: tuple[int, int, int]) -> Finding:
    text = f"Python {'.'.join(map(str, version))}"
    low, high = (".".join(map(str, part)) for part in PYTHON)
    if version[:2] < PYTHON[0]:
        return wrong("python", f"{text} is too old.", f"Install Python {low} or newer and install meshnode into it.")
    if version[:2] >= PYTHON[1]:
        return warning("python", f"{text} is untested.", f"Use {low} or newer, below {high}, if something breaks.")
    return ok("python", text)


def check_folder(facts: FolderFacts) -> Finding:
    if not facts.exists:
        return wrong(
            "data folder",
            f"{facts.path} does not exist, so this device is in no network.",
            "Run `meshnode init` or `meshnode join TICKET`, or name another folder with --data.",
        )
    if facts.problem:
        return wrong(
            "data folder",
            f"Nothing can be written in {facts.path}: {facts.problem}.",
            _way_to_write(facts),
        )
    if facts.mode & 0o077:
        return warning(
            "data folder",
            f"Other users can look into {facts.path} (mode {facts.mode:04o}).",
            f"Close it with: chmod 700 {facts.path}",
        )
    return ok("data folder", f"{facts.path} can be written and is closed to other users")


def _way_to_write(facts: FolderFacts) -> str:
    """What lets this user write in the folder."""
    match facts.error:
        case errno.EROFS:
            return "Its file system is read-only: mount it so that it can be written, or choose another with --data."
        case errno.ENOSPC | errno.EDQUOT:
            return "Free some space there, or choose another folder with --data."
        case errno.ENOTDIR:
            return "It is a file, or lies in one: choose another with --data."
        case errno.EACCES | errno.EPERM if facts.ours:
            return f"Let its owner, who is this user, write in it (chmod u+rwx {facts.path})."
        case errno.EACCES | errno.EPERM:
            return f"Give it to this user (chown -R $USER {facts.path}), or choose another with --data."
        case _:
            return "Choose another with --data; the log of the system may tell more."


def check_disk(path: str, *, free: int, used: int, held: int, quota: int, reserve: int) -> Finding:
    """`used`: by model files on the disk; `held`: their bytes, as the quota counts them; `quota`: content.quota;
    `reserve`: what the node always leaves free."""
    if free <= reserve:
        return wrong(
            "disk",
            f"Only {format_size(free)} is free on the disk of {path}; below {format_size(reserve)} the node takes "
            "no files.",
            "Free some space, or move the data folder to another disk.",
        )
    if held > quota:
        return warning(
            "disk",
            f"The model files take {format_size(held)}, more than content.quota ({format_size(quota)}): layers in "
            "use, pinned models and last copies stay.",
            "Raise content.quota, give other nodes room, or `meshnode model unpin` or `remove` a model.",
        )
    wanted = max(0, quota - used)
    if wanted > free - reserve:
        return warning(
            "disk",
            f"content.quota allows {format_size(wanted)} more model files, but only {format_size(free)} are free on "
            f"the disk of {path}.",
            f"Free some space, or set content.quota to at most {format_size(used + free - reserve)}.",
        )
    return ok("disk", f"{format_size(free)} free, {format_size(used)} of the quota of {format_size(quota)} used")


def check_key(facts: KeyFacts) -> Finding:
    if not facts.exists:
        return wrong(
            "node key",
            f"There is no {facts.path}.",
            "`meshnode init` or `meshnode join TICKET` makes it; after a disk loss, restore it from a backup.",
        )
    if facts.problem:
        remedy = f"Restore {facts.path} from a backup if it is damaged."
        return wrong("node key", f"{facts.problem.rstrip('.')}.", remedy)
    if facts.sealed:
        return ok("node key", "protected by a passphrase; not opened, because MESHNODE_PASSPHRASE is not set")
    return ok("node key", facts.peer)


def check_private_files(files: Sequence[PrivateFile]) -> list[Finding]:
    found = []
    for file in files:
        if file.problem:
            found.append(
                wrong(
                    "permissions",
                    f"{file.path} can't be read: {file.problem}.",
                    f"Run meshnode as the user who owns it, or: chown $USER {file.path}",
                )
            )
        elif file.mode & 0o077:
            found.append(
                wrong(
                    "permissions",
                    f"Other users can read {file.path} (mode {file.mode:04o}), and it holds secrets.",
                    f"Close it with: chmod 600 {file.path}",
                )
            )
    closed = counted(len(files), "secret file is", "secret files are")
    return found or [ok("permissions", f"{closed} closed to other users")]


def check_membership(facts: MembershipFacts, now_ms: int) -> Finding:
    if not facts.exists:
        return wrong(
            "membership",
            "This node belongs to no network yet.",
            "Make one with `meshnode init`, or enter one with `meshnode join TICKET`.",
        )
    if facts.problem:
        return wrong(
            "membership",
            f"{facts.problem.rstrip('.')}.",
            "Ask a member for a ticket (`meshnode invite` there) and run `meshnode join TICKET --anew` here.",
        )
    roles = f"member of {facts.network!r} with the roles {', '.join(facts.roles) or 'none'}"
    if not facts.expires_ms:
        return ok("membership", f"{roles}; it does not expire")
    if facts.expires_ms - now_ms < SOON_MS:
        return warning(
            "membership",
            f"The membership of {facts.network!r} ends in {_duration(facts.expires_ms - now_ms)}.",
            "Ask a member for a ticket (`meshnode invite` there) and run `meshnode join TICKET --anew` here before.",
        )
    return ok("membership", f"{roles}; it ends in {_duration(facts.expires_ms - now_ms)}")


def check_config(path: str, *, exists: bool, problem: str) -> Finding:
    if problem:
        return wrong("config", problem, "Correct it; the other checks assume defaults meanwhile.")
    return ok("config", f"{path} can be used" if exists else f"no {path}; defaults hold")


def check_swarm_key(problem: str) -> Finding:
    """The file of network.swarm_key, where one is named."""
    if problem:
        return wrong("swarm key", f"{problem.rstrip('.')}.", "The node does not start without it.")
    return ok("swarm key", "the file of network.swarm_key can be used")


def check_state(path: str, problem: str) -> Finding:
    """The state file: invites, remembered peers, withdrawals."""
    if problem:
        return wrong("state", problem, "The node does not start without it.")
    return ok("state", f"{path} can be used")


def check_port(facts: PortFacts) -> Finding:
    if facts.ours:
        return ok("port", f"{facts.address} is used by our running node")
    if not facts.problem:
        return ok("port", f"{facts.address} is free")
    if facts.elsewhere:
        return wrong(
            "port",
            f"{facts.address} can't be used: no interface of this machine has this address.",
            "Set network.listen to an address that it has, or to /ip4/0.0.0.0/tcp/4331 for all of them.",
        )
    user = f" by {facts.owner}" if facts.owner else ""
    return wrong(
        "port",
        f"{facts.address} can't be used: {facts.problem}{user}.",
        "Stop the program that uses it, or set network.listen to another.",
    )


def check_addresses(hosts: Sequence[str], announced: Sequence[str]) -> Finding:
    """`hosts`: IP addresses under which the listeners can be dialled."""
    if announced:
        return ok("addresses", f"others are told {', '.join(announced)}")
    far = [host for host in hosts if not ipaddress.ip_address(host).is_loopback]
    if not hosts:
        return wrong(
            "addresses",
            "This device has no address of the family that network.listen names.",
            "Connect it to a network, or set network.listen, for instance to /ip4/0.0.0.0/tcp/4331.",
        )
    if not far:
        return warning(
            "addresses",
            f"Only this very device can reach this node ({', '.join(hosts)}).",
            'Connect the device to a network and listen on it: network.listen = ["/ip4/0.0.0.0/tcp/4331"].',
        )
    return ok("addresses", f"others on the same network reach this node at {', '.join(far)}")


def check_clock(now_ms: int, seen: Mapping[str, int]) -> Finding:
    """`seen`: moments that lie in the past, by what they come from (files, certificates)."""
    source, latest = max(seen.items(), key=lambda item: item[1], default=("", 0))
    behind = latest - now_ms
    text = f"The clock is {_duration(behind)} behind {source}"
    remedy = "Set the clock: timedatectl set-ntp true"
    if behind > CLOCK_WRONG_MS:
        return wrong("clock", f"{text}; peers will refuse this node.", remedy)
    if behind > CLOCK_ODD_MS:
        return warning("clock", f"{text}.", remedy)
    return ok("clock", "not behind anything that is known to have happened")


def check_memory(facts: MemoryFacts) -> Finding:
    wanted = format_size(facts.wanted)
    if facts.wanted == 0:
        return ok("memory", "serve.memory is 0: this node serves no layers")
    if facts.limit is not None and facts.wanted + OVERHEAD_BYTES > facts.limit:
        return wrong(
            "memory",
            f"serve.memory comes to {wanted}, but the limit of this container or service is "
            f"{format_size(facts.limit)}; the system would kill the node.",
            f"Set serve.memory to at most {format_size(max(0, facts.limit - OVERHEAD_BYTES))}, or raise the limit.",
        )
    if facts.wanted > facts.total:
        return wrong(
            "memory",
            f"serve.memory comes to {wanted}, but the device has {format_size(facts.total)}.",
            "Lower serve.memory; 50% takes half of what is free.",
        )
    if facts.wanted > facts.available and not facts.running:
        return warning(
            "memory",
            f"serve.memory comes to {wanted}, but only {format_size(facts.available)} are free; the device would "
            "swap.",
            "Close other programs, or lower serve.memory.",
        )
    if facts.wanted < LEAST_BYTES:
        return warning(
            "memory",
            f"serve.memory comes to {wanted}; only layers of small models fit into that.",
            "Raise serve.memory, or set it to 0 for a node that only asks.",
        )
    return ok("memory", f"serve.memory comes to {wanted}; {format_size(facts.available)} are free")


def check_cores(cores: int, threads: int) -> Finding:
    if threads > cores:
        return warning(
            "cores",
            f"serve.threads is {threads}, but this process may use {counted(cores, 'core')}; threads will wait for "
            "each other.",
            f"Set serve.threads to at most {max(1, cores - 1)}.",
        )
    return ok("cores", f"{counted(cores, 'core')}, {threads} of them for an engine step")


def check_owner(untold: Sequence[str], chosen: Sequence[str]) -> Finding:
    """`untold`: settings of `[owner]` of which the system tells nothing; `chosen`: those that somebody has set."""
    asked = [name for name in untold if name in chosen]
    if asked:
        return warning(
            "owner",
            f"This system does not tell what {' and '.join(asked)} would need, so it has no effect.",
            "Set owner.hours instead, or use `meshnode pause` and `drain`.",
        )
    if untold:
        return ok("owner", f"this system tells nothing for {', '.join(untold)}; the rest of [owner] holds")
    return ok("owner", "the rules of [owner] can be followed")


def check_publishing(*, possible: bool) -> Finding:
    """Only to know: a serving node needs no torch."""
    if possible:
        return ok("publishing", "torch is installed: this device can publish models")
    return ok("publishing", "no torch, and serving needs none; to publish models: pip install 'meshnode[publish]'")


def check_open_files(soft: int, hard: int) -> Finding:
    text = f"This process may open {soft} files at once"
    remedy = f"Raise the limit: ulimit -n {min(hard, 65536)}, or LimitNOFILE= in the systemd unit."
    if soft < FEW_FILES:
        return wrong("open files", f"{text}; every connection and model file needs one.", remedy)
    if soft < ENOUGH_FILES:
        return warning("open files", f"{text}; a large mesh needs {ENOUGH_FILES}.", remedy)
    return ok("open files", f"{text[0].lower()}{text[1:]}")


def check_lock(facts: LockFacts) -> list[Finding]:
    found = []
    if facts.held and not facts.answers:
        who = f"The process {facts.holder}" if facts.holder else "A process"
        kill = f"kill {facts.holder}" if facts.holder else f"find it with: fuser {facts.lock}"
        found.append(
            wrong(
                "leftovers",
                f"{who} holds {facts.lock}, but no node answers.",
                f"It may just be starting or stopping: wait a minute. If it stays, end it ({kill}).",
            )
        )
    if facts.socket_left and not facts.held and not facts.answers:
        found.append(ok("leftovers", "a node ended without tidying up its control socket; the next start does"))
    for pid in facts.orphans:
        found.append(
            warning("leftovers", f"The engine process {pid} lost its node, not its memory.", f"End it: kill {pid}")
        )
    return found or [ok("leftovers", "no leftover process or lock")]


def check_reach(address: str, problem: str) -> Finding:
    """A peer that the configuration or an earlier meeting names, tried without a running node."""
    if problem:
        return warning(
            "reach",
            f"{address} can't be reached: {problem}.",
            "Is meshnode running there? Does a firewall or a router let its TCP port through?",
        )
    return ok("reach", f"{address} accepts connections")


def _duration(milliseconds: int) -> str:
    minutes = milliseconds / 60_000
    if minutes < 120:
        return counted(round(minutes), "minute")
    return counted(round(minutes / 60), "hour") if minutes < 2880 else counted(round(minutes / 1440), "day")
