"""`meshnode pause`: no background work; the node goes on serving its layers."""

from __future__ import annotations

import argparse

from meshnode.cli.duty import add_flags, add_for, seconds_of, tell
from meshnode.cli.settings import client_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser)
    add_for(parser)


def run(arguments: argparse.Namespace) -> int:
    now = client_of(arguments).pause(seconds_of(arguments))
    more = "; it holds no layers either" if now.duty == "drained" else ""
    return tell(arguments, now, f"This node does nothing in the background{more}: {now.why}.")
