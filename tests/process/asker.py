"""Asks the nodes of data folders over and over, and prints one line of JSON for each answer: `Asked`.

A process of its own, so that what the test does meanwhile doesn't count as time that an answer took.

    python -m tests.process.asker EVERY_S FOLDER…
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from meshnode.client import Client
from protocols.errors import MeshError
from tests.process.mesh_rig import QUESTION


@dataclass(frozen=True, slots=True)
class Asked:
    """One question to one node. Times are of the monotonic clock, in seconds."""

    folder: str
    began: float
    took: float
    tokens: tuple[int, ...] = ()
    route: tuple[str, ...] = ()
    error: str = ""


def ask(folder: str) -> Asked:
    began = time.monotonic()
    try:
        answer = Client(Path(folder)).ask(QUESTION).whole()
    except MeshError as error:
        return Asked(folder, began, time.monotonic() - began, error=str(error))
    took = time.monotonic() - began
    return Asked(folder, began, took, tuple(answer.token_ids), tuple(stage.peer for stage in answer.receipt.route))


def keep_asking(folder: str, every_s: float, printing: threading.Lock) -> None:
    while True:
        asked = ask(folder)
        with printing:
            print(json.dumps(asdict(asked)), flush=True)
        time.sleep(max(0.0, asked.began + every_s - time.monotonic()))


def main() -> None:
    every_s, printing = float(sys.argv[1]), threading.Lock()
    for folder in sys.argv[2:]:
        threading.Thread(target=keep_asking, args=(folder, every_s, printing), daemon=True).start()
    sys.stdin.read()  # until whoever started this closes it


if __name__ == "__main__":
    main()
