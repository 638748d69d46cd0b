"""`meshnode stop`: hand over the layers, then stop."""

from __future__ import annotations

import argparse
import time
from typing import Final

import psutil

from meshnode.cli.main import add_data
from meshnode.cli.settings import client_of
from meshnode.core.errors import NodeError

STOP_S: Final = 60.0  # for handing over, which others may have to load for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)


def run(arguments: argparse.Namespace) -> int:
    node = client_of(arguments)
    pid = node.status().pid
    node.stop()
    print("The node hands over its layers and stops.", flush=True)
    ends = time.monotonic() + STOP_S
    while _runs(pid):
        if time.monotonic() > ends:
            raise NodeError("gone", f"the node (process {pid}) has not ended after {STOP_S:.0f} s; look at its log")
        time.sleep(0.1)
    return 0


def _runs(pid: int) -> bool:
    """Whether the process is still there; one that has ended and waits for its parent is not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
