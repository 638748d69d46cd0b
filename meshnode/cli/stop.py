"""`meshnode stop`: hand over the layers, say goodbye, stop."""

from __future__ import annotations

import argparse

from meshnode import client
from meshnode.cli.main import add_data
from meshnode.cli.settings import folder_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)


def run(arguments: argparse.Namespace) -> int:
    client.ask_one(folder_of(arguments), {"do": "stop"})
    print("The node hands over its layers and stops.")
    return 0
