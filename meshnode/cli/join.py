"""`meshnode join TICKET`: enter a network."""

from __future__ import annotations

import argparse
import os

from meshnode.cli.main import add_data
from meshnode.cli.settings import add_settings, ask_passphrase, flags_given, folder_of, new_passphrase, settings
from meshnode.config.keep import keep_settings
from meshnode.core.paths import Paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("ticket", help="what `meshnode init` or `meshnode invite` printed")
    parser.add_argument("--passphrase", action="store_true", help="protect the node key with a passphrase")
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Dial the addresses in the ticket, redeem it, keep the membership and the flags in the data folder."""
    import trio

    from meshnode import __version__
    from meshnode.core import log
    from meshnode.membership.enrolment import describe_ticket, open_identity, open_ticket
    from meshnode.membership.identity import Identity
    from meshnode.membership.joining import join
    from meshnode.membership.port import Membership
    from meshnode.net.libp2p.host import Libp2pHost
    from meshnode.net.swarm_key import load_swarm_key
    from meshnode.state.database import Database

    folder = folder_of(arguments)
    config = settings(arguments)
    log.set_up(level=arguments.log_level or "error", format=config.log.format)
    text = arguments.ticket.split()[-1] if arguments.ticket.split() else ""  # the whole line may have been pasted
    ticket = open_ticket(text)
    print(describe_ticket(text))
    paths = Paths(folder)
    paths.create()
    if Identity.exists(folder):
        identity = Identity.load(folder, ask_passphrase)
    else:
        identity = open_identity(folder, new_passphrase(arguments.passphrase))
    name = config.node.name or os.uname().nodename
    swarm_key = load_swarm_key(config.network.swarm_key)

    async def enter() -> Membership:
        host = Libp2pHost(identity.seed, ["/ip4/127.0.0.1/tcp/0"], swarm_key=swarm_key)
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            membership = await join(host, text, folder=folder, name=name, software=__version__)
            nursery.cancel_scope.cancel()
        return membership

    membership = trio.run(enter, strict_exception_groups=True)
    with Database(paths.state) as database:
        from meshnode.core.clock import wall_ms

        for peer, addresses in ticket.peers().items():
            database.remember_peer(peer, addresses, wall_ms())
    keep_settings(folder, flags_given(arguments))
    print(f"This node is a member of {membership.network.name!r}. Start it with:\n")
    print(f"    meshnode start --data {folder}\n")
    return 0
