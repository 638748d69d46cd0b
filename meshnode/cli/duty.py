"""What `meshnode pause`, `drain` and `resume` share."""

from __future__ import annotations

import argparse
import json

from meshnode.api.messages import DutyStatus, plain
from meshnode.cli.main import add_data
from meshnode.core.durations import parse_duration
from meshnode.core.errors import ConfigError
from meshnode.core.printable import printable


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("--json", action="store_true", help="what holds now, as JSON")


def add_for(parser: argparse.ArgumentParser) -> None:
    """The flag of what ends by itself."""
    parser.add_argument("--for", dest="time", metavar="TIME", help="30m, 2h, 1d; without it, until `meshnode resume`")


def seconds_of(arguments: argparse.Namespace) -> float:
    """What `--for` says; 0: for good. Raises ConfigError."""
    try:
        return 0.0 if arguments.time is None else parse_duration(arguments.time)
    except ValueError as error:
        raise ConfigError(f"--for: {error}") from None


def tell(arguments: argparse.Namespace, now: DutyStatus, done: str) -> int:
    """Say what holds now; `done` when it is what was asked for."""
    print(json.dumps(plain(now)) if arguments.json else printable(done))
    return 0
