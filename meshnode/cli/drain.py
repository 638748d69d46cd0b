"""`meshnode drain`: no background work, and the layers go to other nodes; the node itself stays."""

from __future__ import annotations

import argparse

from meshnode.cli.duty import add_flags, add_for, seconds_of, tell
from meshnode.cli.settings import client_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser)
    add_for(parser)


def run(arguments: argparse.Namespace) -> int:
    now = client_of(arguments).drain(seconds_of(arguments))
    return tell(arguments, now, f"This node gives its layers to others and takes none: {now.why}.")
