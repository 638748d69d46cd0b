"""The trainer's process: `python -m meshnode.trainer THREADS PARENT`. See `wire.py` for what it reads and writes.

It takes what others leave: the lowest priority, idle I/O, and as many threads as it is told. It ends when the node
closes its input or dies, whatever the way, and can be stopped and killed at any moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, Final

import psutil

from meshnode.core.errors import FatalError, ModelError
from meshnode.trainer import wire
from meshnode.trainer.port import Step
from protocols.errors import MeshError

_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>
_NEEDED: Final = ("torch", "transformers", "peft", "safetensors")


def main(arguments: list[str]) -> int:
    """Serve until the node closes the input. The exit code is 0 then."""
    threads, parent = int(arguments[0]), int(arguments[1])
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group; the node decides
    _take_what_is_left()
    # Libraries print to stdout as they like; the real one is kept for our lines alone.
    lines = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    _serve(sys.stdin.buffer, lines, threads)
    return 0


def _serve(requests: BinaryIO, lines: BinaryIO, threads: int) -> None:
    workshop: Any = None

    def say(message: wire.Json) -> None:
        lines.write(json.dumps(message).encode() + b"\n")

    while line := requests.readline():
        try:
            if workshop is None:
                workshop = _workshop(threads)
            say({"done": workshop.carry_out(*wire.unpack_job(line), _reporter(say))})
        except (FatalError, MeshError) as error:
            say(wire.error_to_json(error))
        except MemoryError:
            say(wire.error_to_json(ModelError("There is not enough memory on this device to train this model.")))


def _reporter(say: Callable[[wire.Json], None]) -> Callable[[Step], None]:
    return lambda step: say(wire.step_to_json(step))


def _workshop(threads: int) -> Any:
    """Imported when there is a job: it takes seconds. Raises ModelError when a package is missing."""
    try:
        import torch

        from meshnode.trainer.workshop import Workshop
    except ImportError as error:
        name = error.name if error.name in _NEEDED else str(error)
        raise ModelError(
            f"Training needs the package {name}, which is not installed here. "
            "Install it: pip install 'meshnode[train]'"
        ) from error
    torch.set_num_threads(threads)
    return Workshop()


def _take_what_is_left() -> None:
    """Compute only when nobody else wants to, and read and write so, where the system knows that."""
    with contextlib.suppress(OSError):
        os.nice(19)
    if sys.platform == "linux":
        with contextlib.suppress(psutil.Error, OSError):
            psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


def _die_with(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent dies; the end of the input does it elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(0)
