"""The files by which systemd (Linux) and launchd (macOS) run a node for one user. Nothing is read or written here."""

from __future__ import annotations

import plistlib
from collections.abc import Sequence
from pathlib import Path

from meshnode.core.errors import ConfigError


def systemd_unit(command: Sequence[str], folder: Path) -> str:
    """A unit of the user's own manager. Raises ConfigError: a word of the command can't stand in one."""
    words = " ".join(_quoted(word) for word in command)
    return f"""\
[Unit]
Description=meshnode, a node of a private mesh ({_plain(str(folder))})
# Five failures within ten minutes, then a person should look.
StartLimitIntervalSec=600
StartLimitBurst=5

[Service]
Type=exec
ExecStart={words}
# MESHNODE_PASSPHRASE of a protected key may stand there (mode 0600); the file may be missing.
EnvironmentFile=-{_plain(str(folder / "service.env"))}
UMask=0077

Restart=on-failure
RestartSec=5
# A setting, the key or the membership, a model, the disk: trying again changes nothing about them.
RestartPreventExitStatus=2 3 4 5
# The node hands its layers to others first; its children end with it.
KillSignal=SIGTERM
KillMode=mixed
TimeoutStopSec=90
LimitCORE=0
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""


def launchd_agent(label: str, command: Sequence[str], folder: Path) -> bytes:
    """A property list for ~/Library/LaunchAgents. Raises ConfigError, as above."""
    for word in command:
        _check(word)
    return plistlib.dumps(
        {
            "Label": label,
            "ProgramArguments": list(command),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": 30,
            "ExitTimeOut": 90,  # seconds for handing over the layers
            "Umask": 0o077,
            "ProcessType": "Background",
            "StandardErrorPath": str(folder / "logs" / "service.log"),
        }
    )


def _check(word: str) -> None:
    if not word.isprintable():
        raise ConfigError(f"{word!r} can't stand in the file of a service; choose a folder with another name")


def _plain(text: str) -> str:
    """For a value that systemd takes as it stands, but for specifiers."""
    _check(text)
    return text.replace("%", "%%")


def _quoted(word: str) -> str:
    """For ExecStart, where quotes, variables and specifiers mean something (systemd.service(5))."""
    text = _plain(word).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{text}"'
