"""`meshnode init`: a new private network, and a ticket for the next device."""

from __future__ import annotations

import argparse
from pathlib import Path

from meshnode.cli.invite import knows_addresses, print_ticket
from meshnode.cli.main import add_data
from meshnode.cli.settings import add_settings, folder_of, new_passphrase, settings
from meshnode.core.errors import DiskError
from meshnode.core.paths import Paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("network", nargs="?", default="home", help="name of the network (default: home)")
    parser.add_argument("--passphrase", action="store_true", help="protect the node key with a passphrase")
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make the network, keep the flags in config.toml, print the ticket."""
    from meshnode.membership.enrolment import init_network

    folder = folder_of(arguments)
    config = settings(arguments)
    Paths(folder).create()
    membership = init_network(
        folder, arguments.network, node_name=config.node.name, passphrase=new_passphrase(arguments.passphrase)
    )
    keep_flags(folder, {key: value for key, value in _flag_values(arguments).items() if value is not None})
    print(
        f"The network {membership.network.name!r} ({membership.network_id}) is made; this node is its first member."
    )
    if knows_addresses(config):
        print_ticket(config, folder, uses=1, hours=24.0)
        print(f"Start this node with:\n\n    meshnode start --data {folder}\n")
    else:
        print("It listens on any free port, so a ticket can be made only while it runs:\n")
        print(f"    meshnode start --data {folder}\n    meshnode invite --data {folder}\n")
    return 0


def _flag_values(arguments: argparse.Namespace) -> dict[str, object]:
    from meshnode.cli.settings import FLAGS

    return {setting: getattr(arguments, flag, None) for flag, setting in FLAGS.items()}


def keep_flags(folder: Path, values: dict[str, object]) -> None:
    """Write the settings given as flags into a new config.toml, so that `start` finds them again."""
    path = Paths(folder).config
    if not values or path.exists():
        return
    sections: dict[str, list[str]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name} = {_toml(value)}")
    text = "\n".join(line for section, lines in sections.items() for line in (f"[{section}]", *lines, ""))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiskError(f"{path} can't be written: {error.strerror or error}") from error


def _toml(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value).lower() if isinstance(value, bool) else str(value)
