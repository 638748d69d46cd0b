"""What one lesson has come to, on the disk: replaced as a whole, so a crash anywhere leaves a state that was reached.

One file for each lineage: the vectors as numpy's .npz, the rest as JSON among them. Beside it the losses of all steps
as a table for people, and the folders of the trainer's jobs.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from meshnode.core.errors import DiskError
from meshnode.core.log import get_logger
from protocols.delta.frame import Vector

FILE: Final = "learned.npz"
CURVE: Final = "losses.csv"
ADAPTER: Final = "adapter.npy"  # the vector, for other programs
KEPT_DISTANCES: Final = 64
_META: Final = "meta"

_log = get_logger("learning")


@dataclass(slots=True, kw_only=True)
class Page:
    """Where a node is in one lesson.

    Attributes:
      vector: our adapter.
      published: the last round of which a delta was given away, or -1.
      steps: of training, all rounds together.
      optimiser: file of the trainer with the moments that belong to `vector`; "": none yet.
      slow, momentum: of the mode noloco.
      reference: of the modes broadcast and masked: what all have in common.
      residual: what the last delta did not say (mode broadcast).
      distances: to others' adapters that were mixed in, oldest first.
      recent: (round, exchange, cid, bytes) of our deltas, newest first.
      parent: CID of the record of our last delta; "": none yet.
    """

    lesson: str
    vector: Vector
    published: int = -1
    steps: int = 0
    optimiser: str = ""
    slow: Vector | None = None
    momentum: Vector | None = None
    reference: Vector | None = None
    residual: Vector | None = None
    distances: list[float] = field(default_factory=list)
    recent: list[tuple[int, int, str, int]] = field(default_factory=list)
    parent: str = ""
    mixed: int = 0
    experience: dict[str, Any] | None = None  # what is known about training (policy/training.py)
    done: bool = False  # the rounds of the lesson are over
    adapter: str = ""  # CID of what was made of it

    @property
    def vectors(self) -> dict[str, Vector]:
        """Those that are there, by name."""
        named = {name: getattr(self, name) for name in _VECTORS}
        return {name: vector for name, vector in named.items() if vector is not None}


_VECTORS: Final = ("vector", "slow", "momentum", "reference", "residual")
_PLAIN: Final = tuple(name for name in Page.__dataclass_fields__ if name not in _VECTORS)


class Book:
    """The pages of one lineage. Every call is blocking."""

    def __init__(self, folder: Path, parameters: int) -> None:
        """`folder`: of this lineage alone. `parameters`: length of its vectors."""
        self.folder = folder
        self._parameters = parameters

    def read(self, lesson: str) -> Page | None:
        """What was reached in a lesson; None when it is a new one, or the file can't be read."""
        try:
            with np.load(self.folder / FILE, allow_pickle=False) as stored:
                meta: dict[str, Any] = json.loads(stored[_META].tobytes())
                vectors = {name: stored[name] for name in stored.files if name != _META}
            if set(vectors) - set(_VECTORS) or any(
                vector.shape != (self._parameters,) or vector.dtype != np.float32 for vector in vectors.values()
            ):
                return None
            meta["recent"] = [tuple(entry) for entry in meta["recent"]]
            page = Page(**meta, **vectors)
        except FileNotFoundError:
            return None
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            _log.warning("learning.page_lost", file=str(self.folder / FILE), reason=str(error))
            return None
        return page if page.lesson == lesson else None

    def write(self, page: Page) -> None:
        """Keep a page instead of the one before, at once and for good. Raises DiskError."""
        plain = {name: value for name, value in asdict(page).items() if name in _PLAIN}
        buffer = io.BytesIO()
        meta = np.frombuffer(json.dumps(plain).encode(), np.uint8)
        arrays: dict[str, Any] = {_META: meta, **page.vectors}
        np.savez(buffer, **arrays)
        self._replace(self.folder / FILE, buffer.getvalue())

    def write_adapter(self, vector: Vector) -> Path:
        """The vector as a file of its own. Raises DiskError."""
        buffer = io.BytesIO()
        np.save(buffer, vector)
        path = self.folder / ADAPTER
        self._replace(path, buffer.getvalue())
        return path

    def note_losses(self, first: int, losses: Sequence[float]) -> None:
        """Add the losses of steps to the table; `first`: the number of the first of them. Raises DiskError."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self.folder / CURVE
            head = "" if path.exists() else "step,loss\n"
            with path.open("a", encoding="utf-8") as file:
                file.write(head + "".join(f"{first + i},{loss:.6g}\n" for i, loss in enumerate(losses)))
        except OSError as error:
            raise _no_room(self.folder, error) from error

    def job(self, steps: int) -> Path:
        """The folder of the job that begins after so many steps."""
        return self.folder / f"steps-{steps:06d}"

    def clear_jobs(self, but: str) -> None:
        """Remove what former jobs left, but the folder of one file."""
        keep = Path(but).parent if but else None
        for folder in self.folder.glob("steps-*"):
            if folder != keep:
                shutil.rmtree(folder, ignore_errors=True)

    def _replace(self, path: Path, data: bytes) -> None:
        fresh = path.with_suffix(".new")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with fresh.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _no_room(self.folder, error) from error


def _no_room(folder: Path, error: OSError) -> DiskError:
    return DiskError(f"What was learned can't be kept in {folder}: {error.strerror or error}.")
