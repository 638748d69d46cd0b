"""`meshnode doctor`: every check with a good and a bad case, the facts it reads, and the command itself."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshnode import __version__
from meshnode.api.messages import ContentStatus, HealthStatus, PeerStatus, RefusalStatus, Status
from meshnode.cli.doctor import as_json, line, summary
from meshnode.cli.main import main
from meshnode.client import Client
from meshnode.config.load import load_config
from meshnode.core.confinement import seccomp
from meshnode.core.confinement.confine import ALL
from meshnode.core.paths import Paths
from meshnode.doctor import child_checks as child
from meshnode.doctor import device_checks as device
from meshnode.doctor import facts as device_facts
from meshnode.doctor import status_checks as node
from meshnode.doctor.child_checks import Confined
from meshnode.doctor.device_checks import (
    FolderFacts,
    KeyFacts,
    LockFacts,
    MembershipFacts,
    MemoryFacts,
    PortFacts,
    PrivateFile,
)
from meshnode.doctor.finding import Finding, Level, exit_code, ok, warning, wrong
from meshnode.engine import trial
from meshnode.membership.enrolment import init_network
from meshnode.membership.network import network_path

OK, WARNING, WRONG = Level.OK, Level.WARNING, Level.WRONG
GB = 10**9
DAY = 86_400_000
NOW = 1_700_000_000_000
KEY = "/data/node.key"
PORT = "/ip4/0.0.0.0/tcp/4331"

Check = Callable[[], Finding | list[Finding]]


def memory(**facts: Any) -> Finding:
    return device.check_memory(MemoryFacts(**{"wanted": GB, "available": 4 * GB, "total": 8 * GB, **facts}))


def disk(free: int, used: int = 0, held: int = 0) -> Finding:
    return device.check_disk("/data", free=free, used=used, held=held, quota=20 * GB, reserve=64_000_000)


def confinement(held: tuple[str, ...], what: Confined = Confined.ENGINE, **means: Any) -> Finding:
    return child.check_confinement(what, held, **{"system": "Linux", "landlock": 7, "filtered": True, **means})


def engine(problem: str) -> Finding:
    return child.check_engine("onnx", took_ms=300, rss=80_000_000, problem=problem)


def folder(**facts: Any) -> Finding:
    return device.check_folder(FolderFacts(**{"path": "/data", "exists": True, **facts}))


def key(**facts: Any) -> Finding:
    return device.check_key(KeyFacts(**{"path": KEY, "exists": True, **facts}))


def secret(**facts: Any) -> Finding:
    return device.check_private_files([PrivateFile(path=KEY, **facts)])


def member(**facts: Any) -> Finding:
    return device.check_membership(MembershipFacts(**facts), NOW)


def settings(exists: bool = True, problem: str = "") -> Finding:
    return device.check_config("/data/config.toml", exists=exists, problem=problem)


def port(**facts: Any) -> Finding:
    return device.check_port(PortFacts(address=PORT, **facts))


def control(**facts: Any) -> Finding:
    return node.check_control("/data", **facts)


def lock(**facts: Any) -> list[Finding]:
    return device.check_lock(LockFacts(lock="/data/node.lock", **facts))


def health(severity: str) -> list[Finding]:
    warning = HealthStatus(code="x", severity=severity, text="It is broken. Mend it.")
    return node.check_health(Status(health=(warning,)))


def refused(age_ms: int, **facts: Any) -> list[Finding]:
    refusal = RefusalStatus(at_ms=NOW - age_ms, peer="12D3", code="stranger", text="12D3 was refused")
    return node.check_refusals(Status(refusals=(replace(refusal, **facts),)), NOW)


def link(ms: float | None, *, connected: bool = True) -> list[Finding]:
    return node.check_links(Status(peers=(PeerStatus(name="attic", connected=connected, round_trip_ms=ms),)))


def unreachable(who: str, why: str, **guests: bool) -> list[Finding]:
    return node.check_unreachable(Status(unreachable={who: why}, content=ContentStatus(guests=guests)))


# What is checked, what must come out, and a word that the line must hold.
CASES: dict[str, tuple[Check, Level, str]] = {
    "python": (lambda: device.check_python((3, 11, 7)), OK, "3.11.7"),
    "python too old": (lambda: device.check_python((3, 10, 1)), WRONG, "Install Python 3.11"),
    "python too new": (lambda: device.check_python((3, 14, 0)), WARNING, "untested"),
    "folder": (folder, OK, "/data"),
    "no folder": (lambda: folder(exists=False), WRONG, "meshnode init"),
    "folder read-only": (lambda: folder(problem="read-only file system"), WRONG, "read-only file system"),
    "folder read-only: its disk": (lambda: folder(problem="read-only", error=errno.EROFS), WRONG, "mount it"),
    "folder full": (lambda: folder(problem="no space left", error=errno.ENOSPC), WRONG, "Free some space"),
    "folder: ours": (lambda: folder(problem="denied", error=errno.EACCES), WRONG, "chmod u+rwx /data"),
    "folder: another's": (lambda: folder(problem="denied", error=errno.EACCES, ours=False), WRONG, "chown -R $USER"),
    "folder: a file": (lambda: folder(problem="not a directory", error=errno.ENOTDIR), WRONG, "with --data"),
    "folder open": (lambda: folder(mode=0o755), WARNING, "chmod 700 /data"),
    "disk": (lambda: disk(100 * GB), OK, "100 GB free"),
    "disk: quota does not fit": (lambda: disk(5 * GB, used=2 * GB), WARNING, "content.quota"),
    "disk: what is used counts": (lambda: disk(5 * GB, used=16 * GB), OK, "16 GB of the quota"),
    "disk: more than the quota": (lambda: disk(5 * GB, used=20 * GB, held=21 * GB), WARNING, "Raise content.quota"),
    "disk full": (lambda: disk(1000), WRONG, "Free some space"),
    "key": (lambda: key(peer="12D3KooW"), OK, "12D3KooW"),
    "key sealed": (lambda: key(sealed=True), OK, "passphrase"),
    "no key": (lambda: key(exists=False), WRONG, "meshnode join"),
    "key damaged": (lambda: key(problem="it is damaged"), WRONG, "backup"),
    "permissions": (secret, OK, "1 secret file is closed"),
    "permissions: open": (lambda: secret(mode=0o644), WRONG, f"chmod 600 {KEY}"),
    "permissions: unreadable": (lambda: secret(problem="permission denied"), WRONG, "chown"),
    "membership": (lambda: member(network="home", roles=("serve",)), OK, "does not expire"),
    "membership for long": (lambda: member(network="home", expires_ms=NOW + 30 * DAY), OK, "30 days"),
    "membership ends": (lambda: member(network="home", expires_ms=NOW + 2 * DAY), WARNING, "ends in 2 days"),
    "no membership": (lambda: member(exists=False), WRONG, "meshnode join TICKET"),
    "membership withdrawn": (lambda: member(problem="it was withdrawn"), WRONG, "Ask a member for a ticket"),
    "config": (lambda: settings(exists=True, problem=""), OK, "can be used"),
    "config: none": (lambda: settings(exists=False, problem=""), OK, "defaults"),
    "config: wrong": (lambda: settings(exists=True, problem="no setting serve.memry."), WRONG, "serve.memry"),
    "swarm key": (lambda: device.check_swarm_key(""), OK, "can be used"),
    "swarm key: none": (lambda: device.check_swarm_key("can't read /k: no such file"), WRONG, "/k: no such file."),
    "state": (lambda: device.check_state("/data/state.sqlite", ""), OK, "state.sqlite"),
    "state: damaged": (
        lambda: device.check_state("/data/state.sqlite", "not a database"),
        WRONG,
        "Not a database. The node",
    ),
    "port": (port, OK, "free"),
    "port: ours": (lambda: port(ours=True, problem="in use"), OK, "our running node"),
    "port: taken": (lambda: port(owner="nginx (process 7)", problem="in use"), WRONG, "by nginx (process 7)"),
    "addresses": (lambda: device.check_addresses(["192.0.2.1", "127.0.0.1"], []), OK, "at 192.0.2.1"),
    "addresses: announced": (
        lambda: device.check_addresses([], ["/dns4/bootstrap/tcp/4331"]),
        OK,
        "/dns4/bootstrap/tcp/4331",
    ),
    "addresses: loopback": (lambda: device.check_addresses(["127.0.0.1", "::1"], []), WARNING, "network.listen"),
    "addresses: none": (lambda: device.check_addresses([], []), WRONG, "network.listen"),
    "clock": (lambda: device.check_clock(NOW, {"a file": NOW - DAY}), OK, "not behind"),
    "clock: nothing to compare": (lambda: device.check_clock(NOW, {}), OK, "not behind"),
    "clock: minutes": (
        lambda: device.check_clock(NOW, {"a file": NOW + 120_000, "older": NOW}),
        WARNING,
        "2 minutes behind a file",
    ),
    "clock: years": (
        lambda: device.check_clock(NOW, {"the certificate": NOW + 400 * DAY}),
        WRONG,
        "400 days behind the certificate",
    ),
    "memory": (memory, OK, "1 GB"),
    "memory: serves nothing": (lambda: memory(wanted=0), OK, "serves no layers"),
    "memory: more than is free": (lambda: memory(wanted=5 * GB), WARNING, "Close other programs"),
    "memory: a running node has it": (lambda: memory(wanted=5 * GB, running=True), OK, "5 GB"),
    "memory: more than there is": (lambda: memory(wanted=9 * GB), WRONG, "Lower serve.memory"),
    "memory: container": (lambda: memory(limit=GB), WRONG, "at most 750 MB"),
    "memory: container large enough": (lambda: memory(limit=2 * GB), OK, "1 GB"),
    "memory: hardly any": (lambda: memory(wanted=1_000_000), WARNING, "layers of small models"),
    "cores": (lambda: device.check_cores(4, 1), OK, "4 cores"),
    "cores: too many threads": (lambda: device.check_cores(4, 8), WARNING, "at most 3"),
    "engine": (lambda: engine(""), OK, "300 ms"),
    "engine: fails": (lambda: engine("Illegal instruction."), WRONG, "Illegal instruction"),
    "confinement": (lambda: confinement(ALL), OK, "nothing but compute (Landlock ABI 7, seccomp there)"),
    "confinement: text": (
        lambda: confinement(ALL, Confined.TEXT),
        OK,
        "tokenizers and chat templates can do nothing",
    ),
    "confinement: text on an old kernel": (
        lambda: confinement((), Confined.TEXT, landlock=0),
        WARNING,
        "breaks out of the tokenizer or the chat template could take all memory",
    ),
    "text": (lambda: child.check_text(""), OK, "the right tokens"),
    "text: broken": (lambda: child.check_text("it was killed"), WRONG, "failed: it was killed. Install"),
    "confinement: no landlock": (lambda: confinement(ALL, landlock=0), OK, "Landlock missing"),
    "confinement: no seccomp": (
        lambda: confinement(("memory", "rights", "files"), filtered=False),
        WARNING,
        "could open connections, start programs here (Landlock ABI 7, seccomp missing)",
    ),
    "confinement: old kernel": (lambda: confinement((), landlock=0), WARNING, "Use Linux 5.13"),
    "confinement: elsewhere": (lambda: confinement((), system="Darwin"), WARNING, "people you trust"),
    "publishing": (lambda: device.check_publishing(possible=True), OK, "can publish"),
    "publishing: no torch": (lambda: device.check_publishing(possible=False), OK, "meshnode[publish]"),
    "open files": (lambda: device.check_open_files(1024, 4096), OK, "1024"),
    "open files: few": (lambda: device.check_open_files(512, 4096), WARNING, "ulimit -n 4096"),
    "open files: too few": (lambda: device.check_open_files(64, 1 << 20), WRONG, "ulimit -n 65536"),
    "leftovers": (lock, OK, "no leftover"),
    "leftovers: a node runs": (lambda: lock(held=True, answers=True, socket_left=True), OK, "no leftover"),
    "leftovers: socket": (lambda: lock(socket_left=True), OK, "next start"),
    "leftovers: hung": (lambda: lock(held=True, holder=77), WRONG, "kill 77"),
    "leftovers: hung, nobody known": (lambda: lock(held=True), WRONG, "fuser"),
    "leftovers: engine": (lambda: lock(orphans=(78,)), WARNING, "kill 78"),
    "reach": (lambda: device.check_reach("/ip4/192.0.2.1/tcp/4331", ""), OK, "accepts"),
    "reach: not": (lambda: device.check_reach("/ip4/192.0.2.1/tcp/4331", "no answer"), WARNING, "firewall"),
    "node": (lambda: control(running=True, took_ms=3), OK, "3 ms"),
    "node: none": (lambda: control(running=False), OK, "meshnode start --data /data"),
    "node: hung": (
        lambda: control(running=True, problem="It did not answer within 5 s.", pid=79),
        WRONG,
        "kill -9 79",
    ),
    "version": (lambda: node.check_version(Status(software="0.1.0"), "0.1.0"), OK, "0.1.0"),
    "version: another": (lambda: node.check_version(Status(software="0.0.9"), "0.1.0"), WARNING, "Restart"),
    "ready": (lambda: node.check_readiness(Status(ready=True, readiness="a probe came back")), OK, "a probe"),
    "not ready": (lambda: node.check_readiness(Status(readiness="no model")), WARNING, "no model"),
    "health": (lambda: node.check_health(Status()), OK, "complains of nothing"),
    "health: high": (lambda: health("high"), WRONG, "Mend it"),
    "health: medium": (lambda: health("medium"), WARNING, "Mend it"),
    "health: low": (lambda: health("low"), OK, "Mend it"),
    "health: unknown severity": (lambda: health("extreme"), WARNING, "Mend it"),
    "peers": (lambda: node.check_unreachable(Status()), OK, "connected"),
    "peers: unreachable": (
        lambda: unreachable("12D3", "connection refused."),
        WARNING,
        "12D3 can't be reached: connection refused. Is meshnode running there?",
    ),
    "peers: the reason says it, too": (
        lambda: unreachable("12D3", "…D3 can't be reached: refused"),
        WARNING,
        "12D3 can't be reached: refused. Is meshnode running there?",
    ),
    "peers: a guest": (
        lambda: unreachable("Qm", "refused", Qm=False),
        WARNING,
        "Qm can't be reached: refused. Is the IPFS node running there?",
    ),
    "links": (lambda: link(2.0), OK, "1 peer connected"),
    "links: slow": (lambda: link(250.0), WARNING, "attic takes 250 ms"),
    "links: gone": (lambda: link(250.0, connected=False), OK, "0 peers connected"),
    "links: unmeasured": (lambda: link(None), OK, "1 peer connected"),
    "refusals: none": (lambda: node.check_refusals(Status(), NOW), OK, "nobody"),
    "refusals: recent": (lambda: refused(60_000), WARNING, "meshnode invite"),
    "refusals: old": (lambda: refused(2 * 3_600_000), OK, "nobody"),
    "refusals: of us": (lambda: refused(0, by_us=False, code="clock"), WARNING, "about us"),
    "refusals: unheard-of code": (lambda: refused(0, code="moon"), WARNING, "meshnode doctor"),
}


@pytest.mark.parametrize("case", CASES)
def test_check(case: str) -> None:
    check, level, words = CASES[case]
    result = check()
    found = result if isinstance(result, list) else [result]
    assert [f.level for f in found] == [level]
    assert words in line(found[0])
    assert line(found[0]).startswith(level.value)
    if level is not OK and not case.startswith("health"):
        assert found[0].remedy


def test_texts_of_peers_are_one_line_without_control_characters() -> None:
    nasty = "evil\x1b[2J\r\nok      \x07\u202eport: fine"
    status = Status(
        health=(HealthStatus(code=nasty, severity="low", text=nasty),),
        unreachable={nasty: nasty},
        refusals=(RefusalStatus(at_ms=NOW, peer=nasty, code=nasty, text=nasty, by_us=False),),
        peers=(PeerStatus(name=nasty, connected=True, round_trip_ms=900.0),),
        readiness=nasty,
        software=nasty,
    )
    found = list(node.check_status(status, "0.1.0", NOW))
    assert len(found) == 6
    for finding in found:
        assert "evil" in line(finding)
        assert line(finding).isprintable()


def test_a_status_of_another_version_may_lack_every_field() -> None:
    levels = [finding.level for finding in node.check_status(Status.read({}), "0.1.0", NOW)]
    assert levels == [WARNING, OK, OK, OK, WARNING, OK]  # its version and readiness are unknown


def test_only_what_is_wrong_makes_the_exit_code() -> None:
    fine, odd, bad = ok("a", "b"), warning("a", "b", "c"), wrong("a", "b", "c")
    assert [exit_code(f) for f in ([], [fine], [fine, odd], [fine, bad, odd])] == [0, 0, 0, 1]
    assert summary([fine, odd]) == "Nothing is wrong, 1 warning."
    assert summary([bad, bad]) == "2 things are wrong, 0 warnings."
    assert summary([bad, odd, odd]) == "1 thing is wrong, 2 warnings."
    assert as_json([bad]) == {
        "version": 1,
        "wrong": 1,
        "warning": 0,
        "ok": 0,
        "checks": [{"check": "a", "code": "", "level": "wrong", "text": "B.", "remedy": "C."}],
    }


# ------------------------------------------------------------ the facts


def test_facts_of_a_fresh_network(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    Paths(folder).create()
    assert device_facts.key_facts(folder, None) == KeyFacts(path=str(folder / "node.key"), exists=False)
    assert not device_facts.membership_facts(folder, "", NOW)[0].exists
    init_network(folder, "home", clock=lambda: NOW)
    key = device_facts.key_facts(folder, None)
    assert key.exists
    assert key.peer.startswith("12D3KooW")
    membership, problem, seen = device_facts.membership_facts(folder, key.peer, NOW + 1)
    assert (membership.network, membership.problem, problem) == ("home", "", "")
    assert "invite" in membership.roles
    assert set(seen.values()) == {NOW}
    files = device_facts.private_files(folder)
    assert {Path(file.path).name for file in files} == {"node.key", "network.cbor", "founder.key"}
    assert {file.mode for file in files} == {0o600}
    assert device_facts.folder_facts(folder) == FolderFacts(path=str(folder), exists=True, mode=0o700)


def test_a_key_open_to_others_and_a_damaged_network_are_told(tmp_path: Path) -> None:
    init_network(tmp_path, "home", passphrase="secret")
    assert device_facts.key_facts(tmp_path, None).sealed
    assert device_facts.key_facts(tmp_path, "secret").peer
    assert "passphrase" in device_facts.key_facts(tmp_path, "guess").problem
    Paths(tmp_path).key.chmod(0o644)
    assert "chmod 600" in device_facts.key_facts(tmp_path, "secret").problem
    network_path(tmp_path).write_bytes(b"\xff")
    assert "damaged" in device_facts.membership_facts(tmp_path, "", NOW)[0].problem


def test_a_damaged_state_file_is_told(tmp_path: Path) -> None:
    init_network(tmp_path, "home")
    Paths(tmp_path).state.write_bytes(b"no database" * 100)
    membership, problem, _ = device_facts.membership_facts(tmp_path, "", 1 << 41)
    assert not membership.problem
    assert "state.sqlite" in problem


def test_a_port_is_free_taken_or_ours(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        environ = {"MESHNODE_NETWORK__LISTEN": f"/ip4/127.0.0.1/tcp/{port}, /ip6/::1/tcp/0"}
        config = load_config(tmp_path, environ)
        (taken,) = device_facts.port_facts(config, None)
        assert taken.problem
        assert not taken.ours
        assert str(os.getpid()) in taken.owner
        (ours,) = device_facts.port_facts(config, os.getpid())
        assert ours.ours
    (free,) = device_facts.port_facts(config, None)
    assert not free.problem
    assert device_facts.hosts(config) == ["127.0.0.1", "::1"]


def test_a_running_node_is_asked_for_its_ports() -> None:
    peer = "/p2p/12D3KooWx"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = device_facts.ports_of_node(os.getpid(), ["/ip4/192.0.2.1/tcp/1" + peer])
        assert f"/ip4/127.0.0.1/tcp/{port}" in [facts.address for facts in found]
    assert all(device.check_port(facts).level is OK for facts in found)
    (named,) = device_facts.ports_of_node(None, ["/ip4/192.0.2.1/tcp/4331" + peer])
    assert named.address == "/ip4/192.0.2.1/tcp/4331"
    addresses = ["/ip4/192.0.2.1/tcp/4331" + peer, "/dns4/node.example/tcp/4331" + peer]
    assert device_facts.hosts_of_node(addresses) == (["192.0.2.1"], ["/dns4/node.example/tcp/4331"])


def test_an_address_of_no_interface_is_no_other_program(tmp_path: Path) -> None:
    config = load_config(tmp_path, {}, {"network.listen": ["/ip4/192.0.2.1/tcp/4331"]})
    (facts,) = device_facts.port_facts(config, None)
    finding = device.check_port(facts)
    assert finding.level is Level.WRONG
    assert "no interface of this machine" in finding.text
    assert "program" not in finding.remedy


def test_a_lock_and_its_holder(tmp_path: Path) -> None:
    Paths(tmp_path).create()
    assert not device_facts.lock_facts(tmp_path).held
    with Paths(tmp_path).lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        facts = device_facts.lock_facts(tmp_path)
        assert facts.held
        if sys.platform == "linux":
            assert facts.holder in (os.getpid(), None)  # a sandbox may hide /proc/locks
    assert not device_facts.lock_facts(tmp_path).held


def test_a_swarm_key_that_start_would_refuse_is_told(tmp_path: Path) -> None:
    path = tmp_path / "swarm.key"
    config = load_config(tmp_path, {"MESHNODE_NETWORK__SWARM_KEY": str(path)})
    assert str(path) in device_facts.swarm_key_problem(config)
    path.write_text("nonsense")
    assert "first line" in device_facts.swarm_key_problem(config)
    path.write_text(f"/key/swarm/psk/1.0.0/\n/base16/\n{'ab' * 32}\n")
    assert device_facts.swarm_key_problem(config) == ""
    assert device_facts.swarm_key_problem(load_config(tmp_path, {})) == ""


def test_used_bytes_counts_what_lies_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a").write_bytes(b"x" * 100_000)
    with (tmp_path / "files" / "sparse.part").open("wb") as file:
        file.truncate(1 << 30)
    assert 100_000 <= device_facts.used_bytes(tmp_path) < 1 << 20
    assert device_facts.used_bytes(tmp_path / "absent") == 0
    assert device_facts.held_bytes(tmp_path) == 100_000 + (1 << 30), "a file that is being fetched counts whole"


def test_addresses_are_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        good = f"/ip4/127.0.0.1/tcp/{port}"
        assert device_facts.reach([f"{good}/p2p/12D3KooWx"]) == [(good, "")]
    ((address, problem),) = device_facts.reach([good])
    assert address == good
    assert "refused" in problem
    assert device_facts.reach([]) == []
    assert "no address" in device_facts.reach(["nonsense"])[0][1]


@pytest.mark.process
@pytest.mark.parametrize("kind", ["null", "onnx"])
async def test_the_engine_is_tried_in_a_process_of_its_own(kind: str) -> None:
    result = await trial.try_engine(kind)
    assert (result.kind, result.problem) == (kind, "")
    assert result.took_ms > 0
    assert result.rss_bytes > 1_000_000
    if sys.platform == "linux" and seccomp.known_processor():
        assert result.confined == ALL


@pytest.mark.process
@pytest.mark.parametrize(
    ("part", "broken", "words"),
    [
        ("_expected", lambda kind: trial.VOCABULARY, f"{trial.VOCABULARY} is the right one"),
        ("_write_model", lambda graph, weights: None, "can't be read"),
    ],
)
async def test_an_engine_that_computes_something_else_or_does_not_come_up(
    monkeypatch: pytest.MonkeyPatch, part: str, broken: Callable[..., Any], words: str
) -> None:
    monkeypatch.setattr(trial, part, broken)
    assert words in (await trial.try_engine("onnx")).problem


# ------------------------------------------------------------ the command


def doctor(*words: str) -> int:
    return main(["doctor", *words])


@pytest.mark.process
def test_the_command_on_a_good_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHNODE_NETWORK__LISTEN", "/ip4/127.0.0.1/tcp/0")
    Paths(tmp_path).create()
    init_network(tmp_path, "home")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert doctor("--data", str(tmp_path), "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["version"], result["wrong"]) == (1, 0)
    levels = {check["check"]: check["level"] for check in result["checks"]}
    assert levels["engine"] == levels["membership"] == levels["node"] == "ok"
    assert levels["addresses"] == "warning"  # loopback alone
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}.keys() == before.keys()


@pytest.mark.process
def test_the_command_where_nothing_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong setting is a line among others, and what lies behind it is still looked at."""
    monkeypatch.setenv("MESHNODE_NETWORK__LISTEN", "/ip4/127.0.0.1/tcp/0")
    (tmp_path / "config.toml").write_text('[serve]\nmemry = "1GB"\n')
    tmp_path.chmod(0o755)
    assert doctor("--data", str(tmp_path)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(text.startswith("wrong    config:") and "serve.memory" in text for text in lines)
    assert any(text.startswith("wrong    node key:") for text in lines)
    assert any(text.startswith("warning  data folder:") for text in lines)
    assert any(text.startswith("ok       engine:") for text in lines)
    assert sum(text.startswith(("ok       confinement:", "warning  confinement:")) for text in lines) == 2
    assert any(text.startswith("ok       text: ") for text in lines)
    assert "are wrong" in lines[-1]


@pytest.mark.process
def test_the_command_without_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--data", str(tmp_path / "none")) == 1
    out = capsys.readouterr().out
    assert "meshnode init" in out
    assert "node key" not in out  # what follows from it is not said again
    assert not (tmp_path / "none").exists()


@pytest.mark.process
def test_the_command_beside_a_running_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the node says is shown."""
    status = Status(
        software=__version__,
        pid=1 << 30,
        addresses=("/ip4/127.0.0.1/tcp/4999/p2p/12D3KooWy",),
        readiness="nobody serves layers 3 to 5",
        health=(HealthStatus(code="not-covered", severity="high", text="Nobody serves. Start another node."),),
        unreachable={"12D3KooWx": "connection refused"},
    )
    monkeypatch.setattr(Client, "status", lambda *_, **__: status)
    Paths(tmp_path).create()
    init_network(tmp_path, "home")
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]  # in the settings, which `start --listen` overrode; another program has it
        monkeypatch.setenv("MESHNODE_NETWORK__LISTEN", f"/ip4/127.0.0.1/tcp/{taken}")
        monkeypatch.setenv("MESHNODE_NETWORK__SWARM_KEY", str(tmp_path / "none"))
        assert doctor("--data", str(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "ok       port: /ip4/127.0.0.1/tcp/4999 is used by our running node" in out
    assert str(taken) not in out
    assert f"wrong    swarm key: network.swarm_key: can't read {tmp_path / 'none'}" in out
    assert "wrong    health: Nobody serves. Start another node." in out
    assert "warning  peer: 12D3KooWx can't be reached: connection refused." in out
    assert "warning  ready: The mesh can't answer yet: nobody serves layers 3 to 5." in out


def test_words_of_errors_become_sentences_and_commands_stay_as_they_are() -> None:
    finding = wrong("a", "this node is no member: it was sold", "Close it with: chmod 600 /data/node.key")
    assert line(finding) == "wrong    a: This node is no member: it was sold. Close it with: chmod 600 /data/node.key"
    assert line(warning("a", "serve.memory is odd.", "ask")) == "warning  a: serve.memory is odd. Ask."


def test_what_we_were_refused_for_is_mended_here() -> None:
    """The remedies of a door are not those of who stands before it."""
    (theirs,) = refused(1, code="stranger")
    (ours,) = refused(1, code="stranger", by_us=False)
    assert "`meshnode join TICKET --anew` there" in theirs.remedy
    assert "run `meshnode join TICKET --anew` here" in ours.remedy
