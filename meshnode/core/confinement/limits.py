"""Resource limits and rights that a process gives up by itself."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

OUTPUT_BYTES: Final = 1 << 20  # what a file that is open already may grow to: the log behind stderr
ARENA_BYTES: Final = 1 << 31  # addresses that glibc keeps for the heaps of threads, most of them never touched
SPARE_FILES: Final = 32  # beside those that are open
_KILLED_FIRST: Final = 900  # of 1000
_NO_NEW_PRIVS: Final = 38  # <linux/prctl.h>
_CAPABILITIES: Final = 0x2008_0522  # version 3 of the structures in <linux/capability.h>

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def limit_resources(memory_bytes: int, mapped_bytes: int) -> bool:
    """Bound what this process may take from now on; False where memory can't be bounded. Raises OSError, ValueError.

    RLIMIT_DATA counts writable private memory, which is what takes memory for good: file mappings and reserved
    addresses don't count. RLIMIT_NPROC would count the other processes of this user, so it is left alone.

    Args:
      memory_bytes: writable memory beside what it has.
      mapped_bytes: addresses for files that will be mapped.
    """
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, OUTPUT_BYTES)
    if sys.platform != "linux":
        return False
    data, addresses = _taken()
    _lower(resource.RLIMIT_NOFILE, _highest_descriptor() + 1 + SPARE_FILES)
    _lower(resource.RLIMIT_DATA, data + memory_bytes)
    _lower(resource.RLIMIT_AS, addresses + memory_bytes + mapped_bytes + ARENA_BYTES)
    return True


def be_killed_first() -> None:
    """When the device is out of memory: rather this process than the node."""
    if sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(_KILLED_FIRST))


def give_up_rights() -> bool:
    """No right can be gained any more (no_new_privs), and root's are gone. False where that is not Linux.

    Raises OSError.
    """
    if sys.platform != "linux":
        return False
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
    none = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice 32 of them
    for result in (_LIBC.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), _LIBC.capset(header, none)):
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return True


def _lower(kind: int, limit: int) -> None:
    """Set a limit unless it is lower already."""
    _, hard = resource.getrlimit(kind)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, limit))


def _taken() -> tuple[int, int]:
    """Bytes of writable private memory and of addresses that this process has. Raises OSError."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmData", "VmSize"):
            found[name] = int(value.split()[0]) << 10
    return found["VmData"], found["VmSize"]


def _highest_descriptor() -> int:
    return max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208 only names
