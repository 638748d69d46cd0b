"""`meshnode init`: a new private network, and a ticket for the next device."""

from __future__ import annotations

import argparse
import os

from meshnode.cli.invite import knows_addresses, print_ticket
from meshnode.cli.main import add_data
from meshnode.cli.settings import add_settings, check_memory, flags_given, folder_of, new_passphrase, settings
from meshnode.config.keep import keep_settings
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
    if arguments.memory is not None:
        check_memory(config)
    Paths(folder).create()
    membership = init_network(
        folder,
        arguments.network,
        node_name=config.node.name or os.uname().nodename,
        passphrase=new_passphrase(arguments.passphrase),
    )
    keep_settings(folder, flags_given(arguments))
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
