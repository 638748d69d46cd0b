"""`meshnode config`: the effective settings as a valid config.toml, each with its reason and origin."""

from __future__ import annotations

import argparse

from meshnode.cli.main import add_data
from meshnode.cli.settings import add_settings, settings
from meshnode.config.load import describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    print(describe(settings(arguments)))
    return 0
