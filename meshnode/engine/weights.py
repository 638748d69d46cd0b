"""Group files, mapped into memory: the kernel reads what is touched and may drop it again."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final

import numpy as np

from meshnode.core.errors import ModelError
from meshnode.core.reasons import cause
from meshnode.engine.backend import Array
from meshnode.engine.cut import View

# Norms and biases. Kernels read them in every step, and with one touched page Linux 6.18 maps all the pages that it
# keeps together in its cache: megabytes of weights that the kernels have packed copies of.
COPIED_BYTES: Final = 1 << 16


class Weights:
    """The mapped group files of a span."""

    def __init__(self, groups: dict[str, Path]) -> None:
        """Raises ModelError for a file that can't be mapped."""
        self._groups = groups
        self._maps: dict[Path, mmap.mmap] = {}  # tied ends: one file may serve two groups
        for name, path in groups.items():
            if path in self._maps:
                continue
            try:
                with path.open("rb") as file:
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ModelError(f"The weights {name} at {path} can't be read: {cause(error)}.") from error

    @property
    def size(self) -> int:
        """Bytes of the distinct files."""
        return sum(len(mapped) for mapped in self._maps.values())

    def array(self, name: str, view: View) -> Array:
        """One tensor; a copy only if it is small. Raises ModelError when the file is missing or too short."""
        path = self._groups.get(view.group)
        if path is None:
            raise ModelError(f"The tensor {name} is in the weights {view.group}, which this span was not given.")
        mapped = self._maps[path]
        if view.offset + view.length > len(mapped):
            raise ModelError(
                f"The weights {view.group} at {path} are cut off: {name} ends at byte {view.offset + view.length}, "
                f"the file at {len(mapped)}. Run `meshnode model verify`."
            )
        raw = np.frombuffer(mapped, np.uint8, view.length, view.offset)
        if view.length <= COPIED_BYTES:
            raw = raw.copy()
        return raw.view(view.dtype).reshape(view.shape)

    def release(self) -> None:
        """Drop the pages that were read: kernels have packed copies of most of them, the rest comes back when it
        is touched."""
        for mapped in self._maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)
