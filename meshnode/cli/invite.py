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
from meshnode.core.sizes import counted

MAX_USES: Final = 1_000_000
MAX_HOURS: Final = 24 * 3660  # ten years
ID_DIGITS: Final = 12  # of an invite, as people see it
MIN_ID_DIGITS: Final = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument(
        "--roles",
        metavar="ROLE,ROLE",
        help="what the device may do: ask (questions), serve (hold layers, and ask), publish (choose the model), "
        "invite (let others in, put them out), train (share what its samples have taught the model), vote (judge "
        "what was learned before it is served); default serve",
    )
    parser.add_argument("--list", action="store_true", help="the tickets that this node has given out")
    parser.add_argument("--revoke", metavar="ID", help="make a ticket worthless; --list shows its ID")
    parser.add_argument("--uses", type=int, default=1, help="how many devices may use it (default 1; 0: any number)")
    parser.add_argument("--hours", type=float, default=24.0, help="how long it is valid (default 24)")
    parser.add_argument("--listen", action="append", metavar="MULTIADDR", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    if arguments.list:
        return _list(arguments)
    if arguments.revoke is not None:
        return _revoke(arguments)
    if not 0 <= arguments.uses <= MAX_USES:
        raise ConfigError(f"--uses {arguments.uses}: it takes 0 (any number of devices) to {MAX_USES}")
    if not 0 < arguments.hours <= MAX_HOURS:
        raise ConfigError(f"--hours {arguments.hours:g}: it takes more than 0 and at most {MAX_HOURS}")
    roles = (arguments.roles or "").replace(",", " ").split()
    if arguments.roles is not None and not roles:
        raise ConfigError("--roles names no role; a device without any could do nothing")
    config, folder = settings(arguments), folder_of(arguments)
    print_ticket(config, folder, roles=roles, uses=arguments.uses, hours=arguments.hours)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    """One line for each ticket, also for those that are used up, over or revoked."""
    from meshnode.core.clock import wall_ms
    from meshnode.state.database import Database
    from protocols.membership.trust import day

    with Database(Paths(folder_of(arguments)).state) as state:
        invites = state.invites()
    if not invites:
        print("This node has given out no tickets. Make one with: meshnode invite")
    for invite in invites:
        if invite.revoked_ms:
            until = f"revoked {day(invite.revoked_ms)}"
        elif invite.expires_ms and invite.expires_ms <= wall_ms():
            until = f"expired {day(invite.expires_ms)}"
        elif invite.used_up:
            until = "used up"
        else:
            until = f"until {day(invite.expires_ms)}" if invite.expires_ms else "does not expire"
        uses = f"{invite.used} of {invite.uses or 'any number of'} uses"
        print(f"{invite.id.hex()[:ID_DIGITS]}  {uses:<24}{until:<32}{', '.join(invite.roles)}")
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    """Make a ticket worthless. Whom it has let in stays: `meshnode members remove` puts them out."""
    from meshnode.core.clock import wall_ms
    from meshnode.state.database import Database
    from protocols.membership.trust import day

    wanted = arguments.revoke.lower()
    with Database(Paths(folder_of(arguments)).state) as state:
        found = [invite for invite in state.invites() if invite.id.hex().startswith(wanted)]
        if len(found) != 1 or len(wanted) < MIN_ID_DIGITS:
            many = f"{len(found)} tickets begin with" if found else "this node has given out no ticket"
            raise ConfigError(f"{many} {arguments.revoke!r}; `meshnode invite --list` shows their IDs")
        was_new = state.revoke_invite(found[0].id, wall_ms())
    more = "lets nobody in any more" if was_new else f"was revoked already, on {day(found[0].revoked_ms)}"
    print(f"The ticket {found[0].id.hex()[:ID_DIGITS]} {more}.")
    if found[0].used:
        print(
            f"It has let in {found[0].used} already; `meshnode members` shows them, `meshnode members remove` puts "
            "one out."
        )
    return 0


def print_ticket(config: Config, folder: Path, *, roles: Sequence[str] = (), uses: int, hours: float) -> None:
    """Write an invite into the ledger and print the command that uses it. Without roles: those of `create_invite`."""
    from meshnode.membership.enrolment import open_ticket

    ticket = make_ticket(folder, roles=roles, uses=uses, ttl_s=hours * 3600, addresses=addresses(config, folder))
    times = "any number of devices" if uses == 0 else counted(uses, "device")
    within = f"{hours:g} hour{'' if hours == 1 else 's'}"
    print(
        f"On the next device, within {within} (this ticket is a secret; it lets in {times}, to "
        f"{' and '.join(open_ticket(ticket).roles)}):\n"
    )
    print(f"    meshnode join {ticket}\n")
    print("Where others use that device too, run `meshnode join -` there and paste it: they can see arguments.")


def make_ticket(folder: Path, *, roles: Sequence[str] = (), uses: int, ttl_s: float, addresses: Sequence[str]) -> str:
    """A ticket of a data folder's node. Raises what `create_invite` raises."""
    from meshnode.membership.enrolment import DEFAULT_ROLES, create_invite
    from meshnode.membership.network import load_network
    from meshnode.state.database import Database

    membership = load_network(folder)
    with Database(Paths(folder).state) as state:
        return create_invite(
            membership, state, roles=roles or DEFAULT_ROLES, uses=uses, ttl_s=ttl_s, addresses=addresses
        )


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
