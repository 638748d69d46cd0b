"""Landlock (Linux 5.13 and later): a process gives up files and the network, for itself and for all that it starts.

By system call, because no C library has functions for it. The structures are those of <linux/landlock.h>; which of
their fields a kernel knows follows from its version of the interface (ABI).
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

# the same numbers on every processor
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION: Final = 1  # flag: tell the ABI instead
_PATH_BENEATH: Final = 1

_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILES: Final = (1 << 13) - 1  # ABI 1: execute, write, read, list, remove, make
_FILES_SINCE: Final = {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}  # refer, truncate, ioctl of devices
_TCP: Final = 0b11  # ABI 4: bind, connect
_SCOPES: Final = 0b11  # ABI 6: abstract unix sockets, signals
_NETWORK_ABI, _SCOPE_ABI = 4, 6

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def abi() -> int:
    """The version of the interface that this kernel has; 0 where it has none, or it is switched off."""
    if sys.platform != "linux":
        return 0
    return max(0, int(_LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)))


def restrict(readable: Iterable[Path]) -> int:
    """Give up every file but those below `readable`, which can be read and listed, and all of the network.

    Open files stay as they are. Threads that were started before keep their rights. Wants no_new_privs.

    Returns the ABI: from 4 on TCP is denied, from 6 on signals and abstract sockets of others. 0: nothing was done.
    Raises OSError when the kernel refuses, or a path can't be opened.
    """
    version = abi()
    if not version:
        return 0
    files = _FILES | sum(right for since, right in _FILES_SINCE.items() if version >= since)
    rules = _Ruleset(
        files=files,
        network=_TCP if version >= _NETWORK_ABI else 0,
        scoped=_SCOPES if version >= _SCOPE_ABI else 0,
    )
    size = 24 if version >= _SCOPE_ABI else 16 if version >= _NETWORK_ABI else 8  # fields that it knows
    ruleset = _checked(_LIBC.syscall(_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), 0))
    try:
        for path in readable:
            _allow(ruleset, path)
        _checked(_LIBC.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return version


def _allow(ruleset: int, path: Path) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        allowed = _READ_FILE | (_READ_DIR if stat.S_ISDIR(os.fstat(parent).st_mode) else 0)
        rule = _PathBeneath(allowed=allowed, parent=parent)
        _checked(_LIBC.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0))
    finally:
        os.close(parent)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result
