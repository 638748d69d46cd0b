"""`meshnode start`: run this node until it is told to stop."""

from __future__ import annotations

import argparse
import gc
import signal
import sys
from contextlib import ExitStack

from meshnode.cli.main import add_data
from meshnode.cli.settings import add_settings, ask_passphrase, folder_of, settings
from meshnode.config.settings import Config
from meshnode.core.paths import Paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    Paths(folder_of(arguments)).create()
    return run_node(settings(arguments))


def run_node(config: Config) -> int:
    """Run the node in this process. Ctrl-C or SIGTERM once: leave in good order; twice: at once."""
    import trio

    from meshnode.api.commands import Orders
    from meshnode.api.control import ControlService
    from meshnode.assemble import assemble
    from meshnode.core import log
    from meshnode.core.memory import give_back
    from meshnode.membership.identity import Identity
    from meshnode.node import Node

    paths = config.paths
    file = paths.folder / config.log.file if config.log.file else None
    log.set_up(level=config.log.level, format=config.log.format, file=file)
    identity = Identity.load(paths.folder, ask_passphrase)

    async def serve() -> None:
        with ExitStack() as stack:
            node = Node(assemble(config, identity, stack), config)
            orders = Orders(node)
            control = ControlService(paths.control_socket, orders.commands(), orders.wording)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_obey_signals, node.stopping, nursery.cancel_scope)
                await nursery.start(node.run, control)
                give_back()
                gc.freeze()  # what start-up has made stays: collections need not look at it between two tokens
                print(f"meshnode runs as {identity.peer_id}; Ctrl-C stops it.", file=sys.stderr)
                await node.ended.wait()
                nursery.cancel_scope.cancel()

    async def _obey_signals(stopping: trio.Event, scope: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                if stopping.is_set():
                    scope.cancel()
                    return
                print("Leaving in good order; once more to stop at once.", file=sys.stderr)
                stopping.set()

    trio.run(serve, strict_exception_groups=True)
    return 0
