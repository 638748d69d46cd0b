"""The header of a GGUF file: its metadata and where its tensors lie (ggml's gguf.md, versions 2 and 3).

The reader of the `gguf` package needs seconds for a large vocabulary and maps a file that was cut off without
noticing; this one takes a fraction of that and checks every extent against the file before anything is used.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from meshnode.core.errors import ModelError
from meshnode.publisher.expression import Array

_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9
_MOST_TENSORS: Final = 1 << 20
_MOST_ITEMS: Final = 1 << 24  # of one array: vocabularies have fewer than 2 ** 20


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: `shape` with the slowest dimension first, as numpy counts."""

    name: str
    shape: tuple[int, ...]
    kind: int  # ggml type
    offset: int  # from the start of the file
    size: int  # bytes


class GgufFile:
    """A GGUF file, checked and memory-mapped. Raises ModelError when it isn't a whole GGUF file."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} can't be read: {error}.") from error
        self._at = 0
        try:
            magic, version, tensors, entries = struct.unpack_from("<4sIQQ", self._map, 0)
            if magic != b"GGUF" or version not in (2, 3):
                raise ModelError(f"{path} is not a GGUF file of version 2 or 3.")
            self._at = 24
            self.metadata: dict[str, Any] = {}
            for _ in range(entries):
                key = self._string()
                self.metadata[key] = self._value(self._take("I"))
            if tensors > _MOST_TENSORS:
                raise ModelError(f"{path} announces {tensors} tensors; the file is damaged.")
            found = [self._tensor() for _ in range(tensors)]
        except (struct.error, ValueError, IndexError) as error:
            raise self._cut_off() from error
        start = -(-self._at // self._alignment()) * self._alignment()
        self.tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in found:
            if kind not in gguf.GGML_QUANT_SIZES:
                raise ModelError(f"{path} stores {name} in the unknown ggml type {kind}.")
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
            bytes_ = prod(shape) // block * size
            if start + offset + bytes_ > len(self._map):
                raise self._cut_off(f" {name} would end at byte {start + offset + bytes_}.")
            self.tensors[name] = GgufTensor(name, shape, kind, start + offset, bytes_)

    def read(self, name: str) -> Array:
        """A tensor as float32, dequantised. KeyError for an unknown name."""
        import gguf

        tensor = self.tensors[name]
        kind = gguf.GGMLQuantizationType(tensor.kind)
        raw = np.frombuffer(self._map, np.uint8, tensor.size, tensor.offset)
        try:
            flat = gguf.dequantize(raw, kind)
        except NotImplementedError as error:
            raise ModelError(f"{self.path} stores {name} as {kind.name}, which can't be read.") from error
        return np.asarray(flat, np.float32).reshape(tensor.shape)

    def _cut_off(self, detail: str = "") -> ModelError:
        return ModelError(
            f"{self.path} is cut off or damaged: it has {len(self._map)} bytes and ends inside its content."
            f"{detail} Fetch the file again."
        )

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", 32)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{self.path} has the alignment {value!r}; the file is damaged.")
        return value

    def _take(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._map, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        size = self._take("Q")
        if size > len(self._map) - self._at:
            raise self._cut_off()
        text = self._map[self._at : self._at + size].decode("utf-8", errors="replace")
        self._at += size
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise ModelError(f"{self.path} has metadata of the unknown type {kind}; the file is damaged.")
            return self._take(_SCALARS[kind])
        item, count = self._take("I"), self._take("Q")
        if count > _MOST_ITEMS:
            raise ModelError(f"{self.path} has an array of {count} items in its metadata; the file is damaged.")
        if item in _SCALARS:
            code = f"<{count}{_SCALARS[item]}"
            values = struct.unpack_from(code, self._map, self._at)
            self._at += struct.calcsize(code)
            return list(values)
        return [self._value(item) for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._take("I")
        if dimensions > 8:
            raise ModelError(f"{self.path} has a tensor of {dimensions} dimensions; the file is damaged.")
        shape = tuple(self._take("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._take("I"), self._take("Q")
