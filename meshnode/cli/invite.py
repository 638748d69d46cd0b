"""`meshnode invite`: a ticket for another device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from meshnode.cli.main import add_data
from meshnode.cli.settings import folder_of, settings
from meshnode.client import Client
from meshnode.config.settings import Config
from meshnode.core.errors import ConfigError
from meshnode.core.paths import Paths

MAX_USES: Final = 1_000_000
MAX_HOURS: Final = 24 * 3660  # ten years


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("--uses", type=int, default=1, help="how many devices may use it (default 1; 0: any number)")
    parser.add_argument("--hours", type=float, default=24.0, help="how long it is valid (default 24)")
    parser.add_argument("--listen", action="append", metavar="MULTIADDR", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.uses <= MAX_USES or not 0 < arguments.hours <= MAX_HOURS:
        raise ConfigError(f"--uses takes 0 to {MAX_USES}, --hours more than 0 and at most {MAX_HOURS}")
    print_ticket(settings(arguments), folder_of(arguments), uses=arguments.uses, hours=arguments.hours)
    return 0


def print_ticket(config: Config, folder: Path, *, uses: int, hours: float) -> None:
    """Write an invite into the ledger and print the command that uses it."""
    ticket = make_ticket(folder, uses=uses, ttl_s=hours * 3600, addresses=addresses(config, folder))
    times = {0: "any number of devices", 1: "one device"}.get(uses, f"{uses} devices")
    print(f"On the next device, within {hours:g} hours (this ticket is a secret; it lets in {times}):\n")
    print(f"    meshnode join {ticket}\n")


def make_ticket(folder: Path, *, uses: int, ttl_s: float, addresses: Sequence[str]) -> str:
    """A ticket of a data folder's node. Raises what `create_invite` raises."""
    from meshnode.membership.enrolment import create_invite
    from meshnode.membership.network import load_network
    from meshnode.state.database import Database

    membership = load_network(folder)
    with Database(Paths(folder).state) as state:
        return create_invite(membership, state, uses=uses, ttl_s=ttl_s, addresses=addresses)


def knows_addresses(config: Config) -> bool:
    """Whether a ticket can be made without asking the running node for its ports."""
    return bool(config.network.announce) or not any(text.endswith("/tcp/0") for text in config.network.listen)


def addresses(config: Config, folder: Path) -> list[str]:
    """Where this node can be dialled: what the running node says, else what it is configured to announce or to
    listen on."""
    node = Client(folder)
    if node.is_running():
        return list(node.status().addresses)
    from meshnode.membership.enrolment import own_peer
    from meshnode.net.addresses import reachable_hosts
    from protocols.multiaddr import address_of, owned, parse_address

    peer = own_peer(folder)
    if config.network.announce:
        return [owned(text, peer) for text in config.network.announce]
    out = []
    for text in config.network.listen:
        address = parse_address(text)
        if address.port == 0:
            raise ConfigError(
                f"the node listens on any free port ({text}), so nobody knows it before it runs. "
                "Start it first, then make the ticket, or give a port with --listen /ip4/0.0.0.0/tcp/4331"
            )
        out += [str(address_of(host, address.port, peer)) for host in reachable_hosts(address.host)]
    return out
