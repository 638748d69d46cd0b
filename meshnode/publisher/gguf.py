"""The header of a GGUF file: its metadata and where its tensors lie (ggml's gguf.md, versions 2 and 3).

A model may be split into several files, `name-00001-of-00003.gguf`; the first holds the metadata.

The reader of the `gguf` package needs seconds for a large vocabulary and maps a file that was cut off without
noticing; this one takes a fraction of that and checks every extent against the file before anything is used.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from meshnode.core.errors import ModelError
from meshnode.core.reasons import cause
from meshnode.publisher.expression import Array

_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9
_MOST_TENSORS: Final = 1 << 20
_MOST_PARTS: Final = 9999
_PART: Final = re.compile(r"-(\d{5})-of-(\d{5})$")  # end of the name of a part
_CHUNK: Final = 1 << 22  # values that are dequantised at a time, whole blocks
_MOST_ITEMS: Final = 1 << 24  # of one array: vocabularies have fewer than 2 ** 20

_MOST_DEEP: Final = 8  # arrays of arrays; real files have none


class _Mapped:
    """A file in memory. Raises ModelError when it can't be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    raise ModelError(f"{path} is empty. Fetch it again.")
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} can't be read: {cause(error)}.") from error

    def forget(self, start: int, size: int) -> None:
        """Let go of the pages of a range: they come back when they are read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = start - start % mmap.PAGESIZE
            self.map.madvise(mmap.MADV_DONTNEED, first, start + size - first)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: `shape` with the slowest dimension first, as numpy counts."""

    name: str
    shape: tuple[int, ...]
    kind: int  # ggml type
    offset: int  # from the start of the file
    size: int  # bytes
    file: _Mapped = field(repr=False)  # where they are


class GgufFile:
    """A GGUF file, checked and memory-mapped. Raises ModelError when it isn't a whole GGUF file."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        self._file = _Mapped(path)
        self._map = self._file.map
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
            self.tensors[name] = GgufTensor(name, shape, kind, start + offset, bytes_, self._file)

    @property
    def stem(self) -> str:
        """Name of the file without its ending and without the number of a part."""
        return _PART.sub("", self.path.stem)

    def join(self, other: GgufFile) -> None:
        """Take in the tensors of another part. Raises ModelError when it holds the same ones."""
        both = self.tensors.keys() & other.tensors.keys()
        if both:
            raise ModelError(f"{other.path.name} and another part both hold {min(both)}; they are not of one model.")
        self.tensors |= other.tensors

    def read(self, name: str, part: int | None = None) -> Array:
        """A tensor as float32, dequantised; `part`: only this index of its slowest dimension.

        KeyError for an unknown name. The file's pages are let go again, so that it takes no memory.
        """
        import gguf

        tensor = self.tensors[name]
        kind = gguf.GGMLQuantizationType(tensor.kind)
        shape, offset, size = tensor.shape, tensor.offset, tensor.size
        if part is not None:
            size //= shape[0]
            offset += part * size
            shape = shape[1:]
        block, bytes_ = gguf.GGML_QUANT_SIZES[kind]
        if not prod(shape) or prod(shape) % block:
            raise ModelError(f"{tensor.file.path} is damaged: {name} can't have the shape {tensor.shape}.")
        step = _CHUNK // block * bytes_
        out = np.empty(prod(shape), np.float32)
        done = 0
        try:
            for start in range(offset, offset + size, step):
                raw = np.frombuffer(tensor.file.map, np.uint8, min(step, offset + size - start), start)
                values = gguf.dequantize(raw, kind).reshape(-1)
                out[done : done + len(values)] = values
                done += len(values)
                tensor.file.forget(start, len(raw))
        except NotImplementedError as error:
            raise ModelError(f"{tensor.file.path} stores {name} as {kind.name}, which can't be read.") from error
        except ValueError as error:
            raise ModelError(f"{tensor.file.path} is damaged: {name} can't have the shape {tensor.shape}.") from error
        return out.reshape(shape)

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

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise ModelError(f"{self.path} has metadata of the unknown type {kind}; the file is damaged.")
            return self._take(_SCALARS[kind])
        if depth == _MOST_DEEP:
            raise ModelError(f"{self.path} has arrays inside of arrays in its metadata; the file is damaged.")
        item, count = self._take("I"), self._take("Q")
        if count > _MOST_ITEMS:
            raise ModelError(f"{self.path} has an array of {count} items in its metadata; the file is damaged.")
        if item in _SCALARS:
            code = f"<{count}{_SCALARS[item]}"
            values = struct.unpack_from(code, self._map, self._at)
            self._at += struct.calcsize(code)
            return list(values)
        return [self._value(item, depth + 1) for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._take("I")
        if dimensions > 8:
            raise ModelError(f"{self.path} has a tensor of {dimensions} dimensions; the file is damaged.")
        shape = tuple(self._take("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._take("I"), self._take("Q")


def split_part(path: Path) -> int | None:
    """Which part of a split model a file is by its name, from 1; None: it is a whole model."""
    match = _PART.search(path.stem)
    return int(match[1]) if match else None


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file; of a split model any part, the others are found beside it.

    Raises:
      ModelError: damaged, or a part is missing.
    """
    file = GgufFile(path)
    count, number = (file.metadata.get(f"split.{key}", 0) for key in ("count", "no"))
    match = _PART.search(path.stem)
    if not isinstance(count, int) or count < 2:
        if match is not None and int(match[2]) > 1:
            raise ModelError(f"{path.name} is a part of a split model by its name, but not by its metadata.")
        return file
    if match is None or int(match[2]) != count or not isinstance(number, int) or not 0 <= number < count:
        raise ModelError(
            f"{path.name} is part {number + 1 if isinstance(number, int) else number} of a model that is split into "
            f"{count} files, but its name doesn't end in -00001-of-{count:05}, so the other parts can't be found. "
            "Give all of them the names that they were published under."
        )
    if count > _MOST_PARTS:
        raise ModelError(f"{path.name} says that it is one of {count} parts; the file is damaged.")
    paths = [path.with_name(f"{path.stem[: match.start()]}-{k:05}-of-{count:05}.gguf") for k in range(1, count + 1)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"{path.name} is one of the {count} parts of a split model. Missing beside it: "
            f"{', '.join(missing[:3])}{more}. Fetch them into {path.parent}."
        )
    first = file if paths[0] == path else GgufFile(paths[0])
    for index, other in enumerate(paths[1:], 1):
        part = file if other == path else GgufFile(other)
        if part.metadata.get("split.no") != index or part.metadata.get("split.count") != count:
            raise ModelError(f"{other.name} is not part {index + 1} of {count} by its metadata.")
        first.join(part)
    wanted = first.metadata.get("split.tensors.count")
    if isinstance(wanted, int) and wanted != len(first.tensors):
        raise ModelError(
            f"The {count} parts beside {path.name} hold {len(first.tensors)} tensors, but {wanted} are announced. "
            "They are not of one model."
        )
    return first
