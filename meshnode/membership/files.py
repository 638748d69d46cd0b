"""Files that only their owner may read: written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from meshnode.core.errors import DiskError, IdentityError

MAX_SECRET_FILE = 64 * 1024  # bytes; ours have a few hundred


def write_private(path: Path, data: bytes) -> None:
    """Write a file of mode 0600 atomically: a power cut leaves the old file or the new one.

    Raises DiskError when it can't be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # mkstemp makes the file 0600 before a byte is in it.
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, must survive a power cut
        finally:
            os.close(folder)
    except OSError as error:
        raise DiskError(f"{path} can't be written: {error.strerror or error}") from error


def read_private(path: Path, what: str) -> bytes:
    """Read a file that must be readable by its owner alone; `what` names its content in errors.

    Raises IdentityError: missing, unreadable, too large, or open to others (with the command that helps).
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & 0o077:
                raise IdentityError(
                    f"{path} holds {what} and other users can read it (mode {mode & 0o777:04o}). "
                    f"Close it with: chmod 600 {path}"
                )
            data = file.read(MAX_SECRET_FILE + 1)
    except FileNotFoundError:
        raise IdentityError(f"{path}, which holds {what}, does not exist") from None
    except OSError as error:
        raise IdentityError(f"{path}, which holds {what}, can't be read: {error.strerror or error}") from error
    if len(data) > MAX_SECRET_FILE:
        raise IdentityError(f"{path} has more than {MAX_SECRET_FILE} bytes; that is not {what}")
    return data
