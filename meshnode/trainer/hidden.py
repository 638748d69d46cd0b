"""Hidden states below the first adapted layer: computed once for each text, and kept.

They are the same whatever the adapter is, and cost two thirds of a step where a third of the layers is adapted. In
the file, one after the other: key (16 bytes), number of tokens and CRC-32 of what follows (uint32 little endian), the
states [tokens, hidden] in the type in which the model computes. A file that ends in the middle is cut there. What is
in it tells about the texts: it belongs to their owner, and goes when he forgets them.

Runs in the trainer only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch

from meshnode.core.errors import DiskError

Compute = Callable[[Sequence[tuple[int, ...]]], list[torch.Tensor]]  # token ids -> states [tokens, hidden] each

MOST_BYTES: Final = 1 << 30  # of all states: above, they are begun anew
_HEAD: Final = struct.Struct("<16sII")
_TOGETHER: Final = 32  # texts that are computed at a time


class HiddenStates:
    """What one model computes below one layer."""

    def __init__(self, folder: Path | None, owner: str, width: int, kind: torch.dtype) -> None:
        """
        Args:
          folder: of the file; None: nothing is kept on disk.
          owner: what the states depend on besides the text: model, layer, type.
          width: values per token.

        Raises DiskError.
        """
        self._width = width
        self._kind = kind
        self._row_bytes = width * torch.empty((), dtype=kind).element_size()
        self._memory: dict[bytes, torch.Tensor] = {}  # without a file
        self._places: dict[bytes, tuple[int, int]] = {}  # in the file: offset, tokens
        self._file: int | None = None
        self._end = 0  # bytes that are kept
        if folder is not None:
            self._open(folder, owner)

    def of(self, texts: Sequence[tuple[int, ...]], compute: Compute) -> list[torch.Tensor]:
        """States of each text. What is not known is computed by `compute` and kept."""
        keys = [_key(text) for text in texts]
        known = {key: self._find(key) for key in keys}
        missing = {key: text for key, text in zip(keys, texts, strict=True) if known[key] is None}
        todo = sorted(missing.items(), key=lambda item: len(item[1]))
        for at in range(0, len(todo), _TOGETHER):
            part = todo[at : at + _TOGETHER]
            for (key, _), states in zip(part, compute([text for _, text in part]), strict=True):
                known[key] = states.to(self._kind).contiguous().clone()
                self._keep(key, known[key])
        return [known[key] for key in keys]

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _find(self, key: bytes) -> torch.Tensor | None:
        if self._file is None or key not in self._places:
            return self._memory.get(key)
        at, tokens = self._places[key]
        record = os.pread(self._file, _HEAD.size + tokens * self._row_bytes, at)
        data = bytearray(record[_HEAD.size :])
        if len(data) != tokens * self._row_bytes or record[: _HEAD.size] != _HEAD.pack(key, tokens, zlib.crc32(data)):
            del self._places[key]  # the disk lost it: it is computed again
            return None
        return torch.frombuffer(data, dtype=self._kind).view(tokens, self._width)

    def _keep(self, key: bytes, states: torch.Tensor) -> None:
        size = _HEAD.size + len(states) * self._row_bytes
        if self._end + size > MOST_BYTES:
            self._begin_anew()
        if self._file is None:
            self._memory[key] = states
        else:
            data = states.view(torch.uint8).numpy().tobytes()
            record = _HEAD.pack(key, len(states), zlib.crc32(data)) + data
            try:
                if os.pwrite(self._file, record, self._end) != size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise DiskError(f"Hidden states can't be kept: {error.strerror or error}.") from error
            self._places[key] = (self._end, len(states))
        self._end += size

    def _begin_anew(self) -> None:
        self._memory.clear()
        self._places.clear()
        self._end = 0
        if self._file is not None:
            os.ftruncate(self._file, 0)

    def _open(self, folder: Path, owner: str) -> None:
        name = hashlib.sha256(owner.encode()).hexdigest()[:24]
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(folder / f"{name}.hidden", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DiskError(f"Hidden states can't be kept in {folder}: {error.strerror or error}.") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another trainer writes it
            os.close(file)
            return
        self._file = file
        self._scan(os.fstat(file).st_size)

    def _scan(self, size: int) -> None:
        """Find what is in the file, and cut off what was not written to its end."""
        assert self._file is not None
        at = 0
        while at + _HEAD.size <= size:
            key, tokens, _ = _HEAD.unpack(os.pread(self._file, _HEAD.size, at))
            end = at + _HEAD.size + tokens * self._row_bytes
            if end > size or not tokens:
                break
            self._places[key] = (at, tokens)
            at = end
        self._end = at
        os.ftruncate(self._file, at)


def _key(text: tuple[int, ...]) -> bytes:
    return hashlib.sha256(struct.pack(f"<{len(text)}q", *text)).digest()[:16]
