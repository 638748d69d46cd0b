"""`meshnode start`: run this node until it is told to stop."""

from __future__ import annotations

import argparse
import gc
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import suppress

from meshnode.cli.main import add_data
from meshnode.cli.settings import add_settings, ask_passphrase, check_memory, folder_of, settings
from meshnode.config.settings import Config
from meshnode.core.paths import Paths
from meshnode.core.sizes import counted
from protocols.errors import MeshError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    Paths(folder_of(arguments)).create()
    config = settings(arguments)
    check_memory(config)
    _check_tickets(arguments, config)
    return run_node(config)


def _check_tickets(arguments: argparse.Namespace, config: Config) -> None:
    """Tickets that were made before name the addresses of the settings, which `--listen` overrides this time."""
    from meshnode.core.clock import wall_ms
    from meshnode.state.database import Database

    if arguments.listen is None or config.network.announce or not config.paths.state.exists():
        return
    usual = settings(argparse.Namespace(folder=config.paths.folder)).network.listen
    with Database(config.paths.state) as state:
        usable = sum(invite.usable(wall_ms()) for invite in state.invites())
    if usable and usual != config.network.listen:
        print(
            f"meshnode: note: {counted(usable, 'ticket')} may name {', '.join(usual)}, where this node does not "
            f"listen now ({', '.join(config.network.listen)}). Make new ones while it runs (meshnode invite), or "
            f"keep the address in {config.paths.config}: network.listen.",
            file=sys.stderr,
        )


def run_node(config: Config) -> int:
    """Run the node in this process. Ctrl-C or SIGTERM once: hand over the layers first; twice: stop immediately."""
    import structlog
    import trio

    from meshnode.activity import use_cores
    from meshnode.core import log
    from meshnode.core.memory import give_back
    from meshnode.embed import LocalNode, open_node
    from meshnode.membership.enrolment import own_peer

    use_cores(config.limits.cores)
    file = config.paths.folder / config.log.file if config.log.file else None
    log.set_up(level=config.log.level, format=config.log.format, file=file)

    node: LocalNode | None = None

    async def serve() -> None:
        nonlocal node
        # The receiver comes first: a start takes a second, and a signal meanwhile must find somebody.
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(obey, signals, nursery.cancel_scope)
                with suppress(MeshError):  # what is wrong with the membership is said by who needs it
                    structlog.contextvars.bind_contextvars(node=own_peer(config.paths.folder))
                async with open_node(config, passphrase=ask_passphrase) as node:
                    give_back()
                    gc.freeze()  # what start-up has made stays: collections need not look at it between two tokens
                    print(f"meshnode runs as {node.peer}; Ctrl-C stops it.", file=sys.stderr)
                    await node.wait_stopped()
                nursery.cancel_scope.cancel()

    async def obey(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        async for _ in signals:
            if node is None or node.leaving:
                scope.cancel()
                return
            print("Handing over the layers, then stopping; once more to stop immediately.", file=sys.stderr)
            node.leave()

    trio.run(serve, strict_exception_groups=True)
    return 0
