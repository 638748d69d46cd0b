"""Opening the content folder of a node: encrypted as its owner wants it, with the room that its owner gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from meshnode.core.log import get_logger
from meshnode.store.blob_store import BlobStore
from meshnode.store.cipher import Cipher
from meshnode.store.encryption import is_sealed, set_sealed
from meshnode.store.os_files import available_bytes

_log = get_logger("content")


class Quota(Protocol):
    """How much of a disk."""

    def of(self, whole_bytes: int, /) -> int: ...


@contextmanager
def open_store(
    folder: Path, quota: Quota, cipher: Callable[[], Cipher], *, encrypt: bool | None = None
) -> Iterator[BlobStore]:
    """The content folder, which other processes may use at the same time; closed when the block ends.

    Args:
      cipher: of the node's key; called only where files are encrypted, or are to be.
      encrypt: have all files encrypted, or none, first: only while nobody else uses the folder. None: as they are.

    Raises DiskError, ConfigError (a wrong key), and what `cipher` raises.
    """
    sealed = is_sealed(folder)
    wanted = sealed if encrypt is None else encrypt
    key = cipher() if sealed or wanted else None
    if encrypt is not None and key is not None:
        if wanted != sealed:
            _log.info("content.converting", encrypt=wanted)
        set_sealed(folder, key, wanted)  # goes on with what was cut off, too
    store = BlobStore(folder, quota.of(available_bytes(folder)), cipher=key)
    try:
        yield store
    finally:
        store.close()
