"""`meshnode service`: have the system run this node whenever you are logged in."""

from __future__ import annotations

import argparse
import json
import os
import sys

from meshnode.cli.main import add_data
from meshnode.cli.settings import folder_of
from meshnode.core.errors import ConfigError, IdentityError
from meshnode.core.paths import DATA_VARIABLE, Paths, data_folder
from meshnode.core.printable import printable
from meshnode.membership.keyfile import is_protected
from meshnode.system.manager import Manager, manager_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    install = actions.add_parser("install", help="write the file, start the node now and at every login")
    install.add_argument("--no-start", action="store_true", help="write the file and enable nothing")
    uninstall = actions.add_parser("uninstall", help="stop the node and take the file away")
    status = actions.add_parser("status", help="whether it is installed and runs")
    status.add_argument("--json", action="store_true", help="the same as JSON")
    for action in (install, uninstall, status):
        add_data(action)


def run(arguments: argparse.Namespace) -> int:
    """`status`: exit code 0 when it runs, 7 when not."""
    folder = folder_of(arguments)
    usual = data_folder(None, {name: value for name, value in os.environ.items() if name != DATA_VARIABLE})
    manager = manager_of(folder, usual, os.environ)
    match arguments.action:
        case "install":
            return _install(arguments, manager)
        case "uninstall":
            gone = manager.uninstall()
            print(f"{manager.file} is gone; the node is stopped." if gone else f"There is no {manager.file}.")
            return 0
        case _:
            return _status(arguments, manager)


def _install(arguments: argparse.Namespace, manager: Manager) -> int:
    paths = Paths(folder_of(arguments))
    if not paths.key.exists():
        raise IdentityError(
            f"there is no node in {paths.folder} yet; make a network with `meshnode init`, or enter one with "
            "`meshnode join TICKET`"
        )
    if is_protected(paths.key):
        if sys.platform == "darwin":
            raise ConfigError("the node key is protected by a passphrase, which launchd can't ask for")
        if not (paths.folder / "service.env").exists():
            raise ConfigError(
                "the node key is protected by a passphrase, and a service can't ask for it. Write "
                f"MESHNODE_PASSPHRASE=... into {paths.folder / 'service.env'} (chmod 600)"
            )
    manager.install(start=not arguments.no_start)
    if arguments.no_start:
        print(f"{manager.file} is written, and nothing is enabled. `meshnode service install` does that.")
        return 0
    print(f"The node runs now and whenever you are logged in ({manager.file}).")
    if sys.platform != "darwin":
        print("To have it run before you log in, too: loginctl enable-linger")
    return 0


def _status(arguments: argparse.Namespace, manager: Manager) -> int:
    state = manager.state()
    if arguments.json:
        told = {"installed": state.installed, "running": state.running, "file": str(manager.file)}
        print(json.dumps({**told, "words": state.words}))
    elif not state.installed:
        print("No service is installed for this node: meshnode service install")
    else:
        said = f" ({printable(state.words.splitlines()[0])})" if state.words and not state.running else ""
        print(f"{manager.file}: {'it runs' if state.running else f'it does not run{said}'}")
    return 0 if state.running else 7
