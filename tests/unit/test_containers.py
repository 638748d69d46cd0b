"""`containers/`: what can be known without a Docker engine. The entry script runs under sh, with a fake `meshnode`
on the path and with the real one."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshnode.cli.main import _parser
from meshnode.config.load import load_config
from meshnode.config.settings import DEFAULT_PORT
from meshnode.core.sizes import parse_size
from meshnode.doctor.device_checks import OVERHEAD_BYTES
from meshnode.membership.enrolment import open_ticket
from meshnode.membership.network import load_network

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "containers"
ENTRY = FOLDER / "entry.sh"
TICKET = "meshnode1abc"


# ------------------------------------------------------------ the image


def instructions() -> list[tuple[str, str]]:
    """(instruction, its words) of the Dockerfile, continued lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (FOLDER / "Dockerfile").read_text())
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


def final() -> dict[str, list[str]]:
    """Instructions of the last stage."""
    found = instructions()
    last = max(i for i, (name, _) in enumerate(found) if name == "FROM")
    out: dict[str, list[str]] = {}
    for name, words in found[last:]:
        out.setdefault(name, []).append(words)
    return out


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out of the build; the last line that matches decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern, keep = line.removeprefix("!"), line.startswith("!")
        if not line.startswith("#") and (pattern == "*" or path == pattern or path.startswith(f"{pattern}/")):
            verdict = not keep
    return verdict


def test_the_image_runs_the_node_as_somebody_without_rights() -> None:
    stage = final()
    user = stage["USER"][-1].split(":")[0]
    assert user.isdigit()
    assert int(user) >= 1000
    assert f"--uid {user}" in stage["RUN"][0]
    assert stage["VOLUME"] == ["/data"]
    assert "MESHNODE_DATA=/data" in stage["ENV"][0]
    assert stage["EXPOSE"] == [f"{DEFAULT_PORT}/tcp"]
    assert stage["STOPSIGNAL"] == ["SIGTERM"]
    assert json.loads(stage["ENTRYPOINT"][0]) == ["meshnode"]
    words = json.loads(stage["CMD"][0])
    assert _parser(words).parse_args(words).command == "start"


def test_the_image_has_no_compiler_and_fails_with_torch_in_it() -> None:
    stage = final()
    assert "gcc" not in " ".join(stage["RUN"])
    assert "[publish]" not in (FOLDER / "Dockerfile").read_text()
    (check,) = [run for run in stage["RUN"] if "import torch" in run]
    (condition,) = re.findall(r"if python .*; fi", check)
    for outcome, code in (("0", 1), ("1", 0)):
        shell = f"python() {{ return {outcome}; }}; {condition}"
        assert subprocess.run(["sh", "-c", shell], capture_output=True, timeout=20).returncode == code


def test_what_is_copied_exists_and_reaches_the_build() -> None:
    sources = [
        source
        for name, words in instructions()
        if name == "COPY" and not words.startswith("--from")
        for source in words.split()[:-1]
    ]
    assert "meshnode" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    for secret in (".git", "demo", ".venv", "tests", "containers/.env"):
        assert ignored(secret), secret


@pytest.mark.parametrize(("code", "healthy"), [(0, True), (9, True), (7, False), (1, False)])
def test_a_node_that_answers_is_healthy(code: int, healthy: bool) -> None:
    (check,) = final()["HEALTHCHECK"]
    shell = f"meshnode() {{ return {code}; }}; {check.partition('CMD ')[2]}"
    assert (subprocess.run(["sh", "-c", shell], timeout=20).returncode == 0) is healthy


# ------------------------------------------------------------ the entry script


@pytest.fixture
def place(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a container whose `meshnode` writes down what it is asked."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "meshnode"
    fake.write_text(
        "#!/bin/sh\n"
        'echo "$@" >> "$CALLS"\n'
        'case "$1" in "${FAILS:-nothing}") exit 8 ;;\n'
        'init | join) mkdir -p "$MESHNODE_DATA/network" && : > "$MESHNODE_DATA/network/network.cbor" ;; esac\n'
        f'[ "$1" != invite ] || printf "On the next device:\\n\\n    meshnode join {TICKET}\\n\\n"\n'
    )
    fake.chmod(0o755)
    (tmp_path / "data").mkdir()
    yield {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "CALLS": str(tmp_path / "calls"),
        "MESHNODE_DATA": str(tmp_path / "data"),
        "TICKET_FILE": str(tmp_path / "ticket"),
    }


def enter(place: dict[str, str], *words: str, **more: str) -> tuple[int, list[str], str]:
    """Run the script: (exit code, what meshnode was asked, standard error)."""
    Path(place["CALLS"]).write_text("")
    result = subprocess.run(
        ["sh", str(ENTRY), *words], env={**place, **more}, capture_output=True, text=True, timeout=60
    )
    assert TICKET not in result.stdout + result.stderr  # logs are no place for secrets
    return result.returncode, Path(place["CALLS"]).read_text().splitlines(), result.stderr


def test_the_network_is_made_once_and_the_ticket_every_time(place: dict[str, str]) -> None:
    ticket = Path(place["TICKET_FILE"])
    code, calls, _ = enter(place, "network", NETWORK_NAME="attic")
    assert (code, calls) == (0, ["init attic", "invite --uses 3 --hours 1"])
    assert ticket.read_text() == f"{TICKET}\n"
    assert ticket.stat().st_mode & 0o777 == 0o600
    code, calls, _ = enter(place, "network", TICKET_USES="5", TICKET_HOURS="2")
    assert (code, calls) == (0, ["invite --uses 5 --hours 2"])


@pytest.mark.parametrize("step", ["init", "invite"])
def test_a_network_that_can_not_be_made_leaves_the_old_ticket(place: dict[str, str], step: str) -> None:
    Path(place["TICKET_FILE"]).write_text("old\n")
    code, _, _ = enter(place, "network", FAILS=step)
    assert code != 0
    assert Path(place["TICKET_FILE"]).read_text() == "old\n"


def test_a_node_joins_once_and_starts_every_time(place: dict[str, str]) -> None:
    Path(place["TICKET_FILE"]).write_text(f"{TICKET}\n")
    assert enter(place, "node")[:2] == (0, [f"join --ticket-file {place['TICKET_FILE']}", "start"])
    Path(place["TICKET_FILE"]).unlink()
    assert enter(place, "node", "--layers", "4")[:2] == (0, ["start --layers 4"])


def test_a_node_that_can_not_join_does_not_start(place: dict[str, str]) -> None:
    code, calls, said = enter(place, "node")
    assert (code, calls) == (1, [])
    assert "there is no ticket" in said
    Path(place["TICKET_FILE"]).write_text(f"{TICKET}\n")
    code, calls, _ = enter(place, "node", FAILS="join")
    assert (code, calls) == (8, [f"join --ticket-file {place['TICKET_FILE']}"])


@pytest.mark.parametrize("words", [(), ("start",)])
def test_an_unknown_word_is_refused(place: dict[str, str], words: tuple[str, ...]) -> None:
    code, calls, said = enter(place, *words)
    assert (code, calls) == (1, [])
    assert "network or node" in said


@pytest.mark.net
@pytest.mark.process
def test_first_start_and_restart_with_the_real_program(tmp_path: Path) -> None:
    """What compose does, without containers: network, bootstrap, a node that joins by name, the same node again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "TICKET_FILE": str(tmp_path / "ticket"),
        "MESHNODE_SERVE__ENGINE": "null",
    }
    bootstrap = {
        **common,
        "MESHNODE_DATA": str(tmp_path / "bootstrap"),
        "MESHNODE_NETWORK__LISTEN": f"/ip4/127.0.0.1/tcp/{port}",
        "MESHNODE_NETWORK__ANNOUNCE": f"/dns4/localhost/tcp/{port},",
    }
    node = {
        **common,
        "MESHNODE_DATA": str(tmp_path / "node"),
        "MESHNODE_NETWORK__LISTEN": "/ip4/127.0.0.1/tcp/0",
        "MESHNODE_SERVE__MEMORY": "100MB",
    }
    subprocess.run(["sh", str(ENTRY), "network"], env=bootstrap, check=True, timeout=60)
    ticket = tmp_path / "ticket"
    first = open_ticket(ticket.read_text().strip())
    assert [address.rpartition("/p2p/")[0] for address in first.addresses] == [f"/dns4/localhost/tcp/{port}"]

    meeting_point = started(["meshnode", "bootstrap"], bootstrap)
    try:
        member = started(["sh", str(ENTRY), "node"], node)
        stopped(member)
        assert load_network(tmp_path / "node").network.name == "home"
        # `docker compose up` again, beside the running bootstrap
        subprocess.run(["sh", str(ENTRY), "network"], env=bootstrap, check=True, timeout=60)
        second = open_ticket(ticket.read_text().strip())
        assert second.addresses == first.addresses
        assert second.invite != first.invite
        ticket.unlink()
        stopped(started(["sh", str(ENTRY), "node"], node))
    finally:
        stopped(meeting_point)


def started(words: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """A process that has said that its node runs."""
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("meshnode runs as"):
            watchdog.cancel()
            return process
    watchdog.cancel()
    raise AssertionError(f"{words} ended with {process.wait(20)}: {''.join(said)}")


def stopped(process: subprocess.Popen[str]) -> None:
    """SIGTERM to the process itself: `exec` has made the node of the script."""
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said


# ------------------------------------------------------------ compose


def filled(value: Any) -> Any:
    """Variables replaced by their defaults, as where none is set."""
    if isinstance(value, dict):
        return {key: filled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item) for item in value]
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with the publish extra")
    document = filled(yaml.safe_load((FOLDER / "compose.yaml").read_text()))
    named = {mount.split(":")[0] for service in document["services"].values() for mount in service["volumes"]}
    assert named == set(document["volumes"])
    return dict(document["services"])


def test_every_service_can_start(services: dict[str, Any], tmp_path: Path) -> None:
    (entry,) = [words.split()[1] for words in final()["COPY"] if words.startswith("containers/entry.sh")]
    assert set(services) == {"network", "bootstrap", "node1", "node2", "node3"}
    for name, service in services.items():
        program, *words = [*service.get("entrypoint", ["meshnode"]), *service["command"]]
        if program == "meshnode":
            assert _parser(words).parse_args(words).command == "bootstrap"
        else:
            assert program == Path(entry).name
            assert words == (["network"] if name == "network" else ["node"])
        config = load_config(tmp_path, {key: str(value) for key, value in service["environment"].items()})
        host = "bootstrap" if name == "network" else name
        assert config.network.announce == (f"/dns4/{host}/tcp/{DEFAULT_PORT}",)
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]


def test_the_services_wait_for_each_other(services: dict[str, Any]) -> None:
    assert services["bootstrap"]["depends_on"] == {"network": {"condition": "service_completed_successfully"}}
    assert services["network"]["restart"] == "no"
    assert set(services["network"]["volumes"]) == {"bootstrap:/data", "ticket:/ticket"}
    for name in ("node1", "node2", "node3"):
        assert services[name]["depends_on"] == {"bootstrap": {"condition": "service_healthy"}}
        assert services[name]["volumes"] == [f"{name}:/data", "ticket:/ticket:ro"]
    assert services["network"]["environment"]["TICKET_USES"] == 3


def test_the_limits_leave_room_for_node_and_engine(services: dict[str, Any], tmp_path: Path) -> None:
    for name in ("node1", "node2", "node3"):
        limit = parse_size(services[name]["mem_limit"].replace("m", "MiB"))
        memory = load_config(tmp_path, services[name]["environment"]).serve.memory
        assert memory.percent is None  # a share would be of the whole machine
        assert limit >= memory.size_bytes + OVERHEAD_BYTES


def compose_command() -> list[str] | None:
    if shutil.which("docker"):
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=60)
        if plugin.returncode == 0:
            return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def test_compose_accepts_the_file() -> None:
    command = compose_command()
    if command is None:
        pytest.skip("neither `docker compose` nor `docker-compose` is installed")
    for outside in ("", "/ip4/192.0.2.7/tcp/4331"):
        result = subprocess.run(
            [*command, "-f", str(FOLDER / "compose.yaml"), "config"],
            env={**os.environ, "OUTSIDE": outside},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        assert f"/dns4/bootstrap/tcp/4331,{outside}" in result.stdout
