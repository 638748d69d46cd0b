"""`bootstrap/`: the configuration is one, the unit starts a command that exists, and systemd can read it."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.cli.main import _parser
from meshnode.config.load import load_config
from meshnode.config.settings import DEFAULT_PORT
from meshnode.core.errors import ConfigError, IdentityError

FOLDER = Path(__file__).resolve().parents[2] / "bootstrap"
UNIT = FOLDER / "meshnode-bootstrap.service"


def service() -> configparser.SectionProxy:
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    unit.optionxform = str  # type: ignore[method-assign, assignment]
    unit.read_string(UNIT.read_text())
    return unit["Service"]


def test_the_configuration_is_that_of_a_meeting_point() -> None:
    config = load_config(FOLDER, {})
    assert config.serve.memory.off
    assert [address.rpartition("/")[2] for address in config.network.listen] == [str(DEFAULT_PORT)]
    assert config.log.format == "json"


def test_every_line_that_is_commented_out_can_be_used(tmp_path: Path) -> None:
    text = (FOLDER / "config.toml").read_text()
    opened, count = re.subn(r"(?m)^# (\w+ = )", r"\1", text)
    assert count
    opened = re.sub(r'\] # with IPv6: add ("[^"]+")', r", \1]", opened)
    (tmp_path / "config.toml").write_text(opened)
    network = load_config(tmp_path, {}).network
    assert network.announce == ("/dns4/bootstrap.example.org/tcp/4331",)
    assert len(network.listen) == 2


def test_the_unit_starts_a_command_that_exists() -> None:
    program, *words = shlex.split(service()["ExecStart"])
    assert Path(program).name == "meshnode"
    arguments = _parser(words).parse_args(words)
    assert arguments.command == "bootstrap"
    assert arguments.data == Path("/var/lib") / service()["StateDirectory"]


def test_the_unit_is_hardened_and_stops_the_node_in_good_order() -> None:
    unit = service()
    wanted = {
        "User": "meshnode",
        "Restart": "on-failure",
        "KillSignal": "SIGTERM",
        "KillMode": "mixed",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "CapabilityBoundingSet": "",
        "MemoryMax": "512M",
        "StateDirectoryMode": "0700",
    }
    assert {key: unit[key] for key in wanted} == wanted
    prevented = {int(code) for code in unit["RestartPreventExitStatus"].split()}
    assert prevented == {ConfigError.exit_code, IdentityError.exit_code}
    assert {"AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"} <= set(unit["RestrictAddressFamilies"].split())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_to_say(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    program = shlex.split(service()["ExecStart"])[0]
    copy.write_text(UNIT.read_text().replace(program, sys.executable))
    result = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60)
    complaints = [text for text in result.stderr.splitlines() if UNIT.name in text]
    assert not complaints, "\n".join(complaints)


def test_the_guide_names_what_there_is() -> None:
    """Every command of the guide parses, and every file that it installs exists."""
    text = (FOLDER / "README.md").read_text()
    commands = re.findall(r"(?m)^    mesh (.+)$", text)
    assert {command.split()[0] for command in commands} == {"init", "join", "status", "doctor", "invite"}
    for command in commands:
        words = shlex.split(command)
        _parser(words).parse_args(words)
    for name in re.findall(r"bootstrap/([\w.-]+)", text):
        assert (FOLDER / name).exists(), name
    assert str(DEFAULT_PORT) in text
