"""`meshnode service`: what the files say, whether systemd can read them, and what the service manager is asked."""

from __future__ import annotations

import json
import plistlib
import shutil
import subprocess
from pathlib import Path

import pytest

from meshnode.cli.main import main
from meshnode.core.errors import ConfigError
from meshnode.membership.identity import Identity
from meshnode.system.manager import manager_of
from meshnode.system.unit import systemd_unit

ODD = 'a "b" $HOME %h \\ ä'


def systemctl(folder: Path, code: int = 0, says: str = "") -> Path:
    """A program of that name which notes what it was asked."""
    notes = folder / "asked"
    path = folder / "bin" / "systemctl"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "$@" >> {notes}\necho "{says}" >&2\nexit {code}\n')
    path.chmod(0o755)
    return notes


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))  # which systemd-analyze --user needs
    (tmp_path / "run").mkdir(mode=0o700)
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "MESHNODE_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path


@pytest.fixture
def node(home: Path) -> tuple[str, str]:
    folder = home / "node"
    folder.mkdir(mode=0o700)
    (folder / "network").mkdir()
    Identity.create(folder)
    return "--data", str(folder)


def unit_of(home: Path) -> Path:
    (file,) = (home / ".config" / "systemd" / "user").glob("*.service")
    return file


def test_from_install_to_uninstall(home: Path, node: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    notes = systemctl(home)
    assert main(["service", "status", *node]) == 7
    assert "No service is installed" in capsys.readouterr().out
    assert main(["service", "install", *node]) == 0
    file = unit_of(home)
    assert notes.read_text().splitlines() == ["--user daemon-reload", f"--user enable --now {file.name}"]
    assert f'"-m" "meshnode" "start" "--data" "{node[1]}"' in file.read_text()
    assert main(["service", "status", "--json", *node]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["running"] is True
    systemctl(home, code=3, says="inactive")
    assert main(["service", "status", *node]) == 7
    assert "it does not run (inactive)" in capsys.readouterr().out
    assert main(["service", "uninstall", *node]) == 0
    assert not file.exists()
    assert notes.read_text().splitlines()[-2:] == [f"--user disable --now {file.name}", "--user daemon-reload"]
    assert main(["service", "uninstall", *node]) == 0
    assert "There is no" in capsys.readouterr().out


def test_nothing_is_enabled_unasked(home: Path, node: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    notes = systemctl(home)
    assert main(["service", "install", "--no-start", *node]) == 0
    assert unit_of(home).exists()
    assert not notes.exists()
    assert "nothing is enabled" in capsys.readouterr().out


def test_what_goes_wrong_is_said(home: Path, node: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    systemctl(home, code=1, says="Failed to connect to bus")
    assert main(["service", "install", *node]) == 2
    said = capsys.readouterr().err
    assert "is written, but `systemctl --user daemon-reload` did not work: Failed to connect to bus" in said
    assert main(["service", "install", "--data", str(home / "nowhere")]) == 3
    assert "there is no node in" in capsys.readouterr().err
    sealed = home / "sealed"
    sealed.mkdir(mode=0o700)
    Identity.create(sealed, passphrase="x")
    assert main(["service", "install", "--data", str(sealed)]) == 2
    assert "MESHNODE_PASSPHRASE=... into" in capsys.readouterr().err


def test_each_data_folder_has_a_service_of_its_own(home: Path) -> None:
    usual = home / ".local" / "share" / "meshnode"
    names = {manager_of(folder, usual, {"HOME": str(home)}, "linux").file.name for folder in (usual, home / "b")}
    assert len(names) == 2 and "meshnode.service" in names
    with pytest.raises(ConfigError, match="no service manager of sunos"):
        manager_of(usual, usual, {"HOME": str(home)}, "sunos")
    with pytest.raises(ConfigError, match="can't stand in the file of a service"):
        systemd_unit(["meshnode", "a\nb"], home)


@pytest.mark.parametrize("name", ["plain", ODD])
def test_systemd_reads_the_unit(home: Path, name: str) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("needs systemd-analyze")
    manager = manager_of(home / name, home / "usual", {"HOME": str(home)}, "linux")
    manager.install(start=False)
    verify = [program, "--user", "verify", str(manager.file)]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60)
    ours = [line for line in done.stderr.splitlines() if manager.file.name in line]
    assert not ours and done.returncode == 0, done.stderr
    manager.file.write_bytes(manager.text.replace(b"Restart=on-failure", b"Restart=perhaps"))
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60)
    assert "restart specifier" in done.stderr, "the check can fail"


def test_the_property_list(home: Path) -> None:
    manager = manager_of(home / ODD, home / "usual", {"HOME": str(home)}, "darwin")
    said = plistlib.loads(manager.text)
    assert said["ProgramArguments"][-2:] == ["--data", str(home / ODD)]
    assert said["Label"] == manager.file.stem
    assert said["KeepAlive"] == {"SuccessfulExit": False}
