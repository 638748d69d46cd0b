"""`meshnode bootstrap`: the same node with serving off: rendezvous, directory, gossip."""

from __future__ import annotations

import argparse

from meshnode.cli.main import add_data
from meshnode.cli.settings import add_settings, folder_of, settings
from meshnode.cli.start import run_node
from meshnode.core.paths import Paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    Paths(folder_of(arguments)).create()
    return run_node(settings(arguments, **{"serve.memory": 0, "http.enabled": False}))
