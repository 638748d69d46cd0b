"""`meshnode join`: enter a network.

The ticket comes as an argument, which other users of this device can see while the command runs, from a file, or from
standard input.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from meshnode.cli.main import add_data
from meshnode.cli.settings import (
    add_settings,
    ask_passphrase,
    check_memory,
    client_of,
    flags_given,
    folder_of,
    new_passphrase,
    settings,
)
from meshnode.config.keep import keep_settings
from meshnode.core.errors import ConfigError
from meshnode.core.paths import Paths

if TYPE_CHECKING:
    from meshnode.net.port import Host

MAX_BYTES: Final = 1 << 18  # of a text with a ticket in it; what is longer is something else


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument(
        "ticket",
        nargs="*",
        help="what `meshnode init` or `meshnode invite` printed; - or nothing: it is read from standard input, where "
        "no other user of this device sees it",
    )
    parser.add_argument("--ticket-file", type=Path, metavar="FILE", help="read the ticket from this file")
    parser.add_argument(
        "--anew",
        action="store_true",
        help="take what the ticket gives although this node is a member: it was put out, or has missed a change",
    )
    parser.add_argument("--passphrase", action="store_true", help="protect the node key with a passphrase")
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Dial the addresses in the ticket, redeem it, keep the membership and the flags in the data folder."""
    from meshnode.membership.enrolment import describe_ticket, open_ticket

    text = _text(arguments)
    if not text.strip():
        raise ConfigError(
            "there is no ticket: what was given is empty. Give what `meshnode init` or `meshnode invite` printed on "
            "another device, on standard input, with --ticket-file, or as an argument"
        )
    open_ticket(text)
    print(describe_ticket(text))

    async def obtain(_host: Host, _name: str) -> str:
        return text

    return enter(arguments, obtain)


def enter(arguments: argparse.Namespace, obtain: Callable[[Host, str], Awaitable[str]]) -> int:
    """Redeem the ticket that `obtain` (a running host, the name of this node) gives, and keep what comes of it.

    Raises FatalError, and what `obtain` and `meshnode.membership.joining.join` raise.
    """
    import trio

    from meshnode import __version__
    from meshnode.core import log
    from meshnode.membership.enrolment import open_identity, open_ticket
    from meshnode.membership.identity import Identity
    from meshnode.membership.joining import join
    from meshnode.membership.network import has_network, load_network
    from meshnode.membership.port import Membership
    from meshnode.net.libp2p.host import Libp2pHost
    from meshnode.net.swarm_key import load_swarm_key
    from meshnode.state.database import Database

    folder = folder_of(arguments)
    config = settings(arguments)
    if arguments.memory is not None:
        check_memory(config)
    log.set_up(level=arguments.log_level or "error", format=config.log.format)
    paths = Paths(folder)
    paths.create()
    if Identity.exists(folder):
        identity = Identity.load(folder, ask_passphrase)
    else:
        identity = open_identity(folder, new_passphrase(arguments.passphrase))
    name = config.node.name or os.uname().nodename
    swarm_key = load_swarm_key(config.network.swarm_key)

    async def redeem() -> tuple[str, Membership]:
        host = Libp2pHost(identity.seed, ["/ip4/127.0.0.1/tcp/0"], swarm_key=swarm_key)
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            text = await obtain(host, name)
            anew = bool(getattr(arguments, "anew", False))
            membership = await join(host, text, folder=folder, name=name, software=__version__, anew=anew)
            nursery.cancel_scope.cancel()
        return text, membership

    before = load_network(folder) if has_network(folder) else None
    text, membership = trio.run(redeem, strict_exception_groups=True)
    with Database(paths.state) as database:
        from meshnode.core.clock import wall_ms

        for peer, addresses in open_ticket(text).peers().items():
            database.remember_peer(peer, addresses, wall_ms())
    keep_settings(folder, flags_given(arguments))
    if membership == before:
        print("This node was a member already, and the ticket was not used. If it was put out: meshnode join --anew")
    print(f"This node is a member of {membership.network.name!r}.", end=" ")
    if membership != before and client_of(arguments).is_running():
        print("It runs with the membership that it had before; restart it:\n")
        print(f"    meshnode stop --data {folder}")
    else:
        print("Start it with:\n")
    print(f"    meshnode start --data {folder}\n")
    return 0


def _text(arguments: argparse.Namespace) -> str:
    """The text that holds the ticket. Raises ConfigError when there is none, or two ways to give it are used."""
    words: list[str] = arguments.ticket
    file: Path | None = arguments.ticket_file
    if file is not None and words:
        raise ConfigError("give the ticket either as an argument or with --ticket-file, not both")
    if file is not None:
        try:
            with file.open("rb") as opened:
                return opened.read(MAX_BYTES).decode("utf-8", "replace")
        except OSError as error:
            raise ConfigError(f"the ticket can't be read from {file}: {error.strerror or error}") from error
    if words and words != ["-"]:
        return "\n".join(words)  # unquoted, a ticket of several lines is several words
    if sys.stdin is None:  # `<&-`
        raise ConfigError("there is no ticket: give it on standard input, with --ticket-file, or as an argument")
    if sys.stdin.isatty():
        return _typed()
    try:
        return sys.stdin.buffer.read(MAX_BYTES).decode("utf-8", "replace")
    except OSError as error:
        why = error.strerror or "it can't be read"
        raise ConfigError(f"the ticket can't be read from standard input: {why}") from error


def _typed() -> str:
    """What is pasted into the terminal, until there is a ticket in it, or the end of it (Ctrl-D)."""
    from meshnode.core.errors import IdentityError
    from meshnode.membership.enrolment import open_ticket

    print("Paste the ticket, then press Enter:", file=sys.stderr)
    text = ""
    for line in sys.stdin:
        text += line
        try:
            open_ticket(text)
        except IdentityError:
            continue  # it may go on
        break
    return text
