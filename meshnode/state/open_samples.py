"""Opening the samples of a data folder, with the room that its owner gives them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from meshnode.core.errors import DiskError
from meshnode.state.samples import Samples
from meshnode.state.samples_port import Limits


class Room(Protocol):
    """A share of the disk, as settings say it."""

    def of(self, whole_bytes: int, /) -> int: ...


def open_samples(
    path: Path, most: int, room: Room, key: Callable[[], bytes], *, encrypt: bool | None = None
) -> Samples:
    """See `Samples`. `most` samples in so much `room` of the free disk. Raises what `Samples` raises."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise DiskError(f"the file of samples {path} can't be opened: {error.strerror or error}") from error
    return Samples(path, Limits(samples=most, size_bytes=room.of(free)), key, encrypt=encrypt)
