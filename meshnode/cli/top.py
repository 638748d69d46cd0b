"""`meshnode top`: the mesh in a terminal, as it changes."""

from __future__ import annotations

import argparse

from meshnode.cli.main import add_data
from meshnode.cli.settings import client_of
from meshnode.core.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)


def run(arguments: argparse.Namespace) -> int:
    """Until the person leaves with q. Raises NotRunning; ConfigError without Textual."""
    client = client_of(arguments)
    client.check()
    try:
        from meshnode.cli.top_screen import Top  # Textual is an extra
    except ImportError as error:
        raise ConfigError("`meshnode top` needs Textual: pip install 'meshnode[top]'") from error
    Top(client.status).run()
    return 0
