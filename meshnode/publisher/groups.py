"""Weight groups on disk: one safetensors file per layer, plus the two ends.

A group file is an ordinary safetensors file whose tensors start at multiples of 64 bytes, so that an engine
can map the file and hand ranges of it to its kernels. Byte offsets are known from shapes alone, so the graph
that points into a file can be built before the file is written.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from meshnode.core.errors import DiskError, ModelError
from meshnode.publisher.expression import Array

ALIGN: Final = 64  # bytes: a cache line, and what vector kernels like
_TYPES: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),  # its bits: numpy has no such type
    "U8": np.dtype("u1"),
    "I64": np.dtype("<i8"),
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a group file."""

    name: str
    dtype: str  # safetensors name: "F32", "BF16", "U8", "I64"
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * _TYPES[self.dtype].itemsize


@dataclass(slots=True)
class Group:
    """The tensors of one group file, and where each of them starts."""

    name: str  # "embed", "layer.7", "head"
    tensors: list[Stored] = field(default_factory=list)

    def add(self, tensor: Stored) -> None:
        """Append a tensor unless one of that name is there (tied ends name the same one twice)."""
        if all(t.name != tensor.name for t in self.tensors):
            self.tensors.append(tensor)

    def _header(self) -> tuple[bytes, dict[str, int]]:
        """The padded header, and the absolute offset of each tensor in bytes."""
        entries: dict[str, object] = {}
        relative: dict[str, int] = {}
        position = 0
        for index, tensor in enumerate(self.tensors):
            entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.size],
            }
            relative[tensor.name] = position
            position += tensor.size
            hole = -position % ALIGN
            if hole:  # the format allows no gaps: fill them with a named tensor
                entries[f"_align.{index}"] = {
                    "dtype": "U8",
                    "shape": [hole],
                    "data_offsets": [position, position + hole],
                }
                position += hole
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGN)
        start = 8 + len(text)
        return len(text).to_bytes(8, "little") + text, {name: start + at for name, at in relative.items()}

    def offsets(self) -> dict[str, int]:
        """Absolute byte offset of every tensor in the file."""
        return self._header()[1]

    def write(self, path: Path, read: Callable[[str], Array]) -> int:
        """Write the file, asking `read` for one tensor at a time. Gives its size in bytes.

        Raises:
          ModelError: a tensor has another shape or type than announced.
          DiskError: no room or no permission.
        """
        header, _ = self._header()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with fresh(path) as file:
                file.write(header)
                for tensor in self.tensors:
                    value = np.ascontiguousarray(read(tensor.name))
                    if value.shape != tensor.shape or value.dtype != _TYPES[tensor.dtype]:
                        raise ModelError(
                            f"The weight {tensor.name} has the shape {list(value.shape)} and the type {value.dtype}, "
                            f"but the architecture in config.json expects {list(tensor.shape)} {tensor.dtype}."
                        )
                    file.write(value.data)
                    file.write(bytes(-file.tell() % ALIGN))
                return file.tell()
        except OSError as error:
            raise disk_error(path, error) from error


@contextmanager
def fresh(path: Path) -> Iterator[BinaryIO]:
    """Write a file that nobody changes afterwards, so that a content store may link it instead of copying it.

    An earlier file of that name is left alone under its other links.
    """
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        yield file
    path.chmod(0o444)


def disk_error(path: Path, error: OSError) -> DiskError:
    """A sentence for a failed write."""
    if error.errno == errno.ENOSPC:
        return DiskError(f"The disk is full: {path.name} can't be written to {path.parent}. Free some space there.")
    return DiskError(f"{path} can't be written: {error.strerror or error}.")


def total_size(groups: Iterable[Group]) -> int:
    """Bytes of all tensors (headers and padding left out): enough to ask whether the disk has room."""
    return sum(tensor.size for group in groups for tensor in group.tensors)
