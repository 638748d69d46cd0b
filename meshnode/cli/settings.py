"""What several commands share: reading the configuration, the passphrase, and the node key."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from getpass import getpass
from pathlib import Path
from typing import Final

from meshnode.client import Client
from meshnode.config.load import load_config
from meshnode.config.settings import Config
from meshnode.core.errors import IdentityError

PASSPHRASE: Final = "MESHNODE_PASSPHRASE"

# flag of `start` and `init` -> setting
FLAGS: Final = {
    "name": "node.name",
    "listen": "network.listen",
    "announce": "network.announce",
    "bootstrap_peer": "network.bootstrap",
    "swarm_key": "network.swarm_key",
    "memory": "serve.memory",
    "layers": "serve.layers",
    "threads": "serve.threads",
    "sessions": "serve.sessions",
    "engine": "serve.engine",
    "learn": "learn.enabled",
    "log_level": "log.level",
    "log_format": "log.format",
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The flags that override settings of the configuration file."""
    group = parser.add_argument_group("settings (see `meshnode config` for all of them)")
    group.add_argument("--name", help="what others see instead of the computer's name")
    group.add_argument(
        "--listen", action="append", metavar="MULTIADDR", help="e.g. /ip4/0.0.0.0/tcp/4331; repeatable"
    )
    group.add_argument(
        "--announce", action="append", metavar="MULTIADDR", help="where others reach this node; repeatable"
    )
    group.add_argument("--bootstrap-peer", action="append", metavar="MULTIADDR", help="a peer to dial; repeatable")
    group.add_argument(
        "--swarm-key", type=os.path.abspath, metavar="FILE", help="swarm.key of a private IPFS network, for all nodes"
    )
    group.add_argument("--memory", metavar="SIZE", help="memory for weights and sessions: 800MB, 50%%, 0 for none")
    group.add_argument("--layers", type=int, metavar="N", help="most layers to hold")
    group.add_argument("--threads", type=int, metavar="N", help="threads of one engine step")
    group.add_argument("--sessions", type=int, metavar="N", help="answers that this node computes at the same time")
    group.add_argument("--engine", choices=("onnx", "null"), help="null computes deterministic nonsense, for tests")
    group.add_argument(
        "--learn",
        action="store_true",
        default=None,
        help="train on this device's samples while it is idle, and give others what was learned",
    )
    group.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    group.add_argument("--log-format", choices=("auto", "console", "json"))


def settings(arguments: argparse.Namespace, **overrides: object) -> Config:
    """The configuration of the data folder, with this command's flags on top. Raises ConfigError."""
    environ: Mapping[str, str] = {k: v for k, v in os.environ.items() if k != PASSPHRASE}
    return load_config(folder_of(arguments), environ, {**flags_given(arguments), **overrides})


def check_memory(config: Config) -> None:
    """Say on standard error what is odd about the memory that this device is to give; the doctor's words."""
    from meshnode.doctor import device_checks, facts
    from meshnode.doctor.finding import Level

    finding = device_checks.check_memory(facts.memory_facts(config, running=False))
    if finding.level is not Level.OK:
        print(f"meshnode: note: {finding.text} {finding.remedy}", file=sys.stderr)


def flags_given(arguments: argparse.Namespace) -> dict[str, object]:
    """Settings that were given as flags."""
    values = {setting: getattr(arguments, flag, None) for flag, setting in FLAGS.items()}
    return {setting: value for setting, value in values.items() if value is not None}


def folder_of(arguments: argparse.Namespace) -> Path:
    """The data folder that `main` settled."""
    folder = arguments.folder
    assert isinstance(folder, Path)
    return folder


def client_of(arguments: argparse.Namespace) -> Client:
    """The node that runs on the data folder, if one does."""
    return Client(folder_of(arguments))


def ask_passphrase() -> str:
    """From the environment, else asked for on the terminal. Called only when the key is protected."""
    if PASSPHRASE in os.environ:
        return os.environ[PASSPHRASE]
    if not sys.stdin.isatty():
        raise IdentityError(f"the node key is protected by a passphrase; set {PASSPHRASE}, or start it on a terminal")
    return getpass("Passphrase of the node key: ")


def new_passphrase(wanted: bool) -> str | None:
    """For a new key: None unless asked for; typed twice on a terminal."""
    if not wanted:
        return None
    if PASSPHRASE in os.environ:
        return os.environ[PASSPHRASE]
    if not sys.stdin.isatty():
        raise IdentityError(f"--passphrase needs a terminal, or the passphrase in {PASSPHRASE}")
    first = getpass("New passphrase for the node key: ")
    if first != getpass("Once more: "):
        raise IdentityError("the two passphrases differ; nothing was written")
    return first
