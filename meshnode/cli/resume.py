"""`meshnode resume`: undo `meshnode pause` and `meshnode drain`."""

from __future__ import annotations

import argparse

from meshnode.cli.duty import add_flags, tell
from meshnode.cli.settings import client_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    now = client_of(arguments).resume()
    still = f"The order is taken back, but this node is still {now.duty}: {now.why}."
    return tell(arguments, now, still if now.why else "This node does all of its work again.")
