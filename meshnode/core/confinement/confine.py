"""A child process gives up what it does not need, before it looks at anything foreign.

    libraries_only()                        # first of all: no files but those of libraries
    from meshnode.engine.runtime import ort # what else is needed, and what may start threads
    held = confine(memory_bytes=1 << 28)    # before the first foreign byte is looked at

What is open stays open, so files are opened before that; afterwards nothing can be opened, no library loaded, no
process started, nobody talked to but over what is open. The parent's half is `environment.py`. Kernels differ, so
`confine` tells what holds; what it can try itself, it has tried.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import meshnode
import protocols
from meshnode.core.confinement import landlock, limits, seccomp

MEMORY, RIGHTS, FILES, NETWORK, PROCESSES = "memory", "rights", "files", "network", "processes"
ALL: Final = (MEMORY, RIGHTS, FILES, NETWORK, PROCESSES)
# beside Python's own folders: the system's libraries, and what they ask about the hardware when they start
_SYSTEM: Final = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/etc/ld.so.cache",
    "/proc/self",
    "/proc/cpuinfo",
    "/sys/devices",
    "/sys/bus/pci/devices",
    "/sys/class/drm",
)


@dataclass(frozen=True, slots=True)
class Held:
    """What holds of a confinement."""

    parts: tuple[str, ...]  # of ALL: memory is bounded, no right can be gained, the others can't be reached
    landlock: int  # ABI; 0: not in force
    seccomp: bool

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(part for part in ALL if part not in self.parts)


def libraries_only() -> None:
    """Give up all files but those of installed libraries, and root's rights, before other threads are there.

    What a thread gives up, those that it starts don't have; those that are there keep it. Where the kernel has no
    Landlock, nothing happens; `confine` tells.
    """
    _leave_folder()
    limits.be_killed_first()
    with suppress(OSError):
        if limits.give_up_rights():
            landlock.restrict(_libraries())


def confine(*, memory_bytes: int, mapped_bytes: int = 0, readable: Collection[Path] = ()) -> Held:
    """Give up everything but computing with what is there, for good. Never raises for what a kernel lacks.

    Args:
      memory_bytes: writable memory beside what the process has now.
      mapped_bytes: files that will be mapped from open descriptors.
      readable: files and folders that may still be opened for reading. Each of them must exist.
    """
    _leave_folder()
    limits.be_killed_first()
    parts = []
    with suppress(OSError, ValueError):
        if limits.limit_resources(memory_bytes, mapped_bytes):
            parts.append(MEMORY)
    abi, filtered = 0, False
    with suppress(OSError):
        if limits.give_up_rights():  # an ordinary user may do the others only then
            parts.append(RIGHTS)
            with suppress(OSError):
                abi = landlock.restrict(readable)
            filtered = seccomp.restrict(files=bool(readable))
    parts += _closed(abi, filtered, readable)
    return Held(tuple(parts), abi, filtered)


def _libraries() -> list[Path]:
    package, wire = Path(meshnode.__file__).parent, Path(protocols.__file__).parent
    found = {package, wire, *map(Path, _SYSTEM), *map(Path, (sys.prefix, sys.base_prefix, *sys.path))}
    # a source tree is on the path with all that lies beside the packages
    return sorted(path for path in found - {package.parent, Path("/"), Path()} if path.exists())


def _leave_folder() -> None:
    """Stand in a folder that is empty and stays so, because it is gone: nothing can be found or made there."""
    if not _has_folder():
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix="meshnode-nothing-"))
        os.chdir(folder)
        folder.rmdir()
    except OSError:
        os.chdir("/")  # rather than the data folder of a node


def _has_folder() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def _closed(abi: int, filtered: bool, readable: Collection[Path]) -> Iterator[str]:
    """What can't be reached any more: as the kernel has promised, and as far as it can be tried."""
    if (abi or (filtered and not readable)) and not _opens():
        yield FILES
    if filtered:
        if not _connects():
            yield NETWORK
        yield PROCESSES


def _opens() -> bool:
    try:
        os.close(os.open("/", os.O_RDONLY))
    except OSError:
        return False
    return True


def _connects() -> bool:
    try:
        socket.socket(socket.AF_UNIX).close()
    except OSError:
        return False
    return True
