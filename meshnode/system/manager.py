"""Asks systemd or launchd for what `meshnode service` does."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshnode.core.errors import ConfigError, DiskError
from meshnode.system.unit import launchd_agent, systemd_unit

COMMAND_S: Final = 120.0  # a stop waits until the layers are handed over


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the service manager says."""

    installed: bool
    running: bool
    words: str  # its own, for people; empty: it said nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Manager:
    """One node as a service of this user."""

    file: Path
    text: bytes  # that belongs into it
    enable: tuple[tuple[str, ...], ...]  # commands, in order
    disable: tuple[tuple[str, ...], ...]
    reload: tuple[str, ...]  # after the file is gone; empty: nothing
    ask: tuple[str, ...]  # exit code 0: it runs

    def install(self, *, start: bool) -> None:
        """Write the file and, with `start`, have the node started now and whenever the user logs in.

        Raises DiskError, ConfigError with the words of the service manager.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_bytes(self.text)
        except OSError as error:
            raise DiskError(f"{self.file} can't be written: {error.strerror or error}.") from error
        for command in self.enable if start else ():
            code, words = run(command)
            if code:
                raise ConfigError(
                    f"{self.file} is written, but `{' '.join(command)}` did not work: {words or f'exit code {code}'}"
                )

    def uninstall(self) -> bool:
        """Stop the node and take the file away; whether there was one. Raises DiskError."""
        there = self.file.exists()
        for command in self.disable if there else ():
            run(command)  # it may not be loaded
        try:
            self.file.unlink(missing_ok=True)
        except OSError as error:
            raise DiskError(f"{self.file} can't be removed: {error.strerror or error}.") from error
        if there and self.reload:
            run(self.reload)
        return there

    def state(self) -> State:
        """What is installed and runs."""
        if not self.file.exists():
            return State(installed=False, running=False, words="")
        code, words = run(self.ask)
        return State(installed=True, running=code == 0, words=words)


def run(command: Sequence[str]) -> tuple[int, str]:
    """A command's exit code and what it said."""
    if shutil.which(command[0]) is None:
        return 127, f"this system has no {command[0]}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {COMMAND_S:.0f} s"
    return done.returncode, (done.stderr or done.stdout).strip()


def manager_of(folder: Path, usual: Path, environ: Mapping[str, str], platform: str = sys.platform) -> Manager:
    """The one of this system, for the node of a data folder; `usual`: the folder without --data.

    Raises ConfigError: there is none that we know.
    """
    home = environ.get("HOME", "")
    if not home:
        raise ConfigError("HOME is not set, so there is no place for the file of a service")
    name = "meshnode" if folder == usual else f"meshnode-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}"
    command = (sys.executable, "-m", "meshnode", "start", "--data", str(folder))
    if platform == "darwin":
        label = f"net.{name}"
        file = Path(home) / "Library" / "LaunchAgents" / f"{label}.plist"
        domain = f"gui/{os.getuid()}"
        return Manager(
            file=file,
            text=launchd_agent(label, command, folder),
            enable=(("launchctl", "bootstrap", domain, str(file)),),
            disable=(("launchctl", "bootout", f"{domain}/{label}"),),
            reload=(),
            ask=("launchctl", "print", f"{domain}/{label}"),
        )
    if not platform.startswith("linux"):
        raise ConfigError(f"meshnode knows no service manager of {platform}; have it run: {' '.join(command)}")
    base = environ.get("XDG_CONFIG_HOME", "")
    config = Path(base) if base.startswith("/") else Path(home) / ".config"
    systemctl, unit = ("systemctl", "--user"), f"{name}.service"
    return Manager(
        file=config / "systemd" / "user" / unit,
        text=systemd_unit(command, folder).encode(),
        enable=((*systemctl, "daemon-reload"), (*systemctl, "enable", "--now", unit)),
        disable=((*systemctl, "disable", "--now", unit),),
        reload=(*systemctl, "daemon-reload"),
        ask=(*systemctl, "is-active", unit),
    )
