"""`meshnode model pin`, `unpin` and `remove`: which models stay on this device whole, and which leave it."""

from __future__ import annotations

import argparse
from typing import Final

from meshnode.cli.main import add_data
from meshnode.cli.settings import client_of, folder_of
from meshnode.core.errors import ConfigError
from meshnode.core.paths import Paths
from meshnode.core.sizes import counted, format_size


def add_actions(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pin = actions.add_parser("pin", help="have this node keep every file of a model, not only the layers it serves")
    pin.add_argument("model", metavar="NAME_OR_CID")
    pin.add_argument("--variant", help="precision (default: the one that is served)")
    add_data(pin)
    unpin = actions.add_parser("unpin", help="keep only what this node serves, and its share of the copies")
    unpin.add_argument("model", metavar="NAME_OR_CID")
    add_data(unpin)
    remove = actions.add_parser("remove", help="take a model out of this node")
    remove.add_argument("model", metavar="NAME_OR_CID")
    remove.add_argument("--force", action="store_true", help="even files that no other node may hold")
    add_data(remove)


def pin_model(arguments: argparse.Namespace) -> int:
    """Fetch and pin; the running node does the fetching."""
    from meshnode.api.releases import check_variant
    from meshnode.cli.model import StepProgress, found, open_store

    with open_store(arguments) as store:
        cid, manifest, served = found(arguments, store)
    variant = arguments.variant or served
    check_variant(manifest, variant)
    steps = StepProgress()
    size = client_of(arguments).pin(cid, variant, lambda done, total: steps("fetch", variant, done, total))
    print(f"All of {manifest.name} {manifest.version} {variant} ({format_size(size)}) is on this node, and stays.")
    return 0


def unpin_model(arguments: argparse.Namespace) -> int:
    """Drop the pin; the files stay until their room is needed."""
    from meshnode.cli.model import found, open_store

    with open_store(arguments) as store:
        cid, manifest, _ = found(arguments, store)
        if not store.pins().get(cid, frozenset()) - {cid}:
            raise ConfigError(f"{manifest.name} {manifest.version} is not pinned on this node.")
        store.unpin(cid)
        store.pin(cid, cid)  # its manifest is small, and names the model
    print(
        f"{manifest.name} {manifest.version} is not pinned any more; what this node does not serve, and others hold, "
        "goes when its room is needed."
    )
    return 0


def remove_model(arguments: argparse.Namespace) -> int:
    """Forget the release, free its files; a running node that serves it goes on until it stops."""
    from meshnode.cli.model import found, known_here, open_store
    from meshnode.state import releases
    from meshnode.state.database import Database
    from meshnode.store.port import LAST_PIN

    folder = folder_of(arguments)
    node = client_of(arguments)
    if node.is_running():
        served = node.status().model
        if served is not None and arguments.model in (served.manifest, served.name):
            raise ConfigError(
                f"The network serves {served.name} at the moment. Have it serve another model first "
                "(meshnode model serve NAME), or stop this node."
            )
    with open_store(arguments) as store:
        cid, manifest, _ = found(arguments, store)
        others, _ = known_here(arguments, store)
        shared = {file for other, (kept, _) in others.items() if other != cid for file in kept.all_files()}
        files = {cid, *manifest.all_files()} - shared
        last = files & store.pins().get(LAST_PIN, frozenset()) - {cid}
        if last and not arguments.force:
            raise ConfigError(
                f"This node keeps {counted(len(last), 'file')} of {manifest.name} for the network, and other nodes "
                "may not hold them. Have the network serve another model first (meshnode model serve NAME), or add "
                "--force."
            )
        store.unpin(cid)
        store.drop_pins(files)
        freed = store.remove_unpinned()
    with Database(Paths(folder).state) as database:
        releases.forget(database, cid)
    print(f"{manifest.name} {manifest.version} is removed; {format_size(freed)} are free again.")
    return 0


ACTIONS: Final = {"pin": pin_model, "unpin": unpin_model, "remove": remove_model}
