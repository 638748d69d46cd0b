"""`meshnode stop`: hand over the layers, then stop."""

from __future__ import annotations

import argparse

from meshnode.cli.main import add_data
from meshnode.cli.settings import client_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)


def run(arguments: argparse.Namespace) -> int:
    client_of(arguments).stop()
    print("The node hands over its layers and stops.")
    return 0
