"""`meshnode pair`: let a device in, or enter a network, by six digits instead of a ticket."""

from __future__ import annotations

import argparse
import sys
from getpass import getpass
from typing import Final

from meshnode.cli.main import add_data
from meshnode.cli.settings import add_settings, client_of
from meshnode.core.errors import ConfigError
from meshnode.core.printable import printable

LOOPBACK: Final = ("/ip4/127.", "/ip6/::1/")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument(
        "pin", nargs="*", help="with --with: the PIN that the other device shows; nothing: it is asked for"
    )
    parser.add_argument(
        "--with",
        dest="other",
        metavar="ADDRESS",
        help="enter the network of the device at this address, which its `meshnode pair` prints",
    )
    parser.add_argument("--roles", metavar="ROLE,ROLE", help="what the new device may do, as in `meshnode invite`")
    parser.add_argument("--passphrase", action="store_true", help="with --with: protect the node key")
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.other is not None:
        return _enter(arguments)
    if arguments.pin:
        raise ConfigError(
            "a PIN is typed on the new device, with the address of this one: meshnode pair --with ADDRESS"
        )
    return _show(arguments)


def _show(arguments: argparse.Namespace) -> int:
    """Open pairing on the running node, show the PIN and wait."""
    roles = (arguments.roles or "").replace(",", " ").split()
    for answer in client_of(arguments).pair(roles):
        if "pin" in answer:
            pin, addresses = str(answer["pin"]), [str(address) for address in answer["addresses"]]
            near = [address for address in addresses if not address.startswith(LOOPBACK)] or addresses
            print(f"The PIN is {pin[:3]} {pin[3:]}. On the new device, within {answer['seconds']:.0f} s:\n")
            print(f"    meshnode pair --with {near[0]}\n")
            print(f"and type the PIN there. It lets in one device, to {' and '.join(answer['roles'])}.", flush=True)
        else:
            done = answer["done"]
            who = printable(done["name"]) or done["peer"]
            print(f"{who} has got its ticket. `meshnode members` shows who is in.")
    return 0


def _enter(arguments: argparse.Namespace) -> int:
    """Fetch a ticket by the PIN, and join with it."""
    from meshnode.cli.join import enter
    from meshnode.membership.pairing import read_address, read_pin, ticket_by_pin
    from meshnode.net.port import Host

    if arguments.roles is not None:
        raise ConfigError("--roles is said where the PIN is shown: the device that lets in another one decides that")
    read_address(arguments.other)
    pin = read_pin(" ".join(arguments.pin) or _asked())

    async def obtain(host: Host, name: str) -> str:
        return await ticket_by_pin(host, arguments.other, pin, name=name)

    return enter(arguments, obtain)


def _asked() -> str:
    """The PIN, from the terminal or standard input."""
    if sys.stdin is not None and sys.stdin.isatty():
        return getpass("PIN that the other device shows: ")
    line = "" if sys.stdin is None else sys.stdin.readline(100)
    if not line.strip():
        raise ConfigError("there is no PIN: give it behind the address, or on standard input")
    return line
