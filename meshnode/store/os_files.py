"""What the content folder needs of the operating system: whole writes, locks, durable renames, error sentences."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from meshnode.core.errors import DiskError

# The codes by which a full disk or a missing permission shows; what to do is said once, here.
_REMEDIES: Final = {
    errno.ENOSPC: "the disk is full; free some space, or lower content.quota",
    errno.EDQUOT: "the disk quota of this user is used up; free some space",
    errno.EACCES: "permission denied; give this user write access to it",
    errno.EPERM: "not permitted; give this user write access to it",
    errno.EROFS: "it is mounted read-only; choose another data folder",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n)",
    errno.EFBIG: "the file system does not allow files of this size; choose another data folder",
}

_STAT_BLOCK: Final = 512  # bytes; POSIX, stat(2)


@contextmanager
def disk_errors(path: Path, what: str) -> Iterator[None]:
    """Turn an OSError into the DiskError sentence about doing `what` (a verb phrase) with `path`."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, error.strerror or str(error))
        raise DiskError(f"can't {what} {path}: {remedy}") from error


def write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int | None = None) -> None:
    """Write every byte, at `offset` or at the current position. Raises OSError."""
    view = memoryview(data)
    while len(view):
        count = os.write(descriptor, view) if offset is None else os.pwrite(descriptor, view, offset)
        view = view[count:]
        offset = None if offset is None else offset + count


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def available_bytes(folder: Path) -> int:
    """Free on the disk, or taken by the files of this content folder: a share of it is the same at every start.

    Raises DiskError.
    """
    with disk_errors(folder, "look at the free space of"):
        held = 0
        for path in (folder / "files").glob("*"):
            with suppress(FileNotFoundError):  # a running node may delete some
                held += path.stat().st_blocks * _STAT_BLOCK
        return shutil.disk_usage(folder).free + held


def remove_abandoned(folder: Path, prefix: str) -> None:
    """Delete the folders with such names that no process has locked: who made them was killed. Raises DiskError."""
    with disk_errors(folder, "delete in"):
        for path in folder.glob(f"{prefix}*"):
            if not is_locked(path):
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have `is_locked` say so of a folder. Raises DiskError."""
    with disk_errors(folder, "lock"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock of a file. A missing file is not locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def open_locked(path: Path) -> int | None:
    """Create or open a file for writing and lock it; None while another descriptor holds the lock.

    The lock goes with the descriptor, so a killed process loses it. Raises OSError.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The former owner may have renamed or deleted it between our open and our lock.
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
