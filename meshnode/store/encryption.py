"""Whether the files of a content folder are encrypted, and changing that: `content.encrypt` was switched.

The folder says so itself (a file `sealed` in it, with the fingerprint of the key), so that commands beside a running
node need not know the setting. Encrypted files end in `.sealed`. A change that was interrupted goes on at the next
start of the node.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from meshnode.core.errors import ConfigError
from meshnode.store.cipher import Cipher
from meshnode.store.os_files import disk_errors, sync_folder, write_all
from protocols.errors import RemoteProtocolError
from protocols.ids import cid_to_bytes

SUFFIX: Final = ".sealed"
PIECE_BYTES: Final = 1 << 20


def is_sealed(folder: Path) -> bool:
    """Whether files in this content folder are kept encrypted."""
    return (folder / "sealed").exists()


def check_key(folder: Path, cipher: Cipher | None) -> None:
    """Raises ConfigError when the files are encrypted and this is not their cipher."""
    if not is_sealed(folder):
        return
    if cipher is None:
        raise ConfigError(f"the files in {folder} are encrypted, and there is no key of a node to read them with")
    with disk_errors(folder, "read"):
        found = (folder / "sealed").read_bytes()
    if found != cipher.fingerprint():
        raise ConfigError(
            f"the files in {folder} are encrypted with the key of another node or network; put that key back, or "
            "delete the folder, and this node fetches what it needs anew"
        )


def set_sealed(folder: Path, cipher: Cipher, wanted: bool) -> None:
    """Have all complete files encrypted, or none. Only while no node uses the folder.

    Transfers that were cut off start anew. Raises DiskError, ConfigError (they are encrypted with another key).
    """
    check_key(folder, cipher)
    marker, files = folder / "sealed", folder / "files"
    with disk_errors(folder, "write into"):
        files.mkdir(mode=0o700, parents=True, exist_ok=True)
        if wanted and not marker.exists():
            _write_marker(marker, cipher.fingerprint())
        for path in sorted(files.iterdir()):
            sealed = path.name.removesuffix(".part").endswith(SUFFIX)
            if sealed == wanted:
                continue
            if path.suffix == ".part":
                path.unlink()
            else:
                _convert(path, files / (path.stem if sealed else path.name + SUFFIX), cipher)
        if not wanted:
            marker.unlink(missing_ok=True)


def _write_marker(marker: Path, content: bytes) -> None:
    half = marker.with_suffix(".part")
    half.write_bytes(content)
    half.replace(marker)


def _convert(source: Path, target: Path, cipher: Cipher) -> None:
    try:
        name = cid_to_bytes(source.name.removesuffix(SUFFIX))
    except RemoteProtocolError:
        return  # none of ours; the store removes it
    before = source.stat()
    half = target.with_name(target.name + ".part")
    with source.open("rb", buffering=0) as reader, half.open("wb", buffering=0) as writer:
        at = 0
        while piece := reader.read(PIECE_BYTES):
            write_all(writer.fileno(), cipher.apply(name, piece, at))
            at += len(piece)
        os.fchmod(writer.fileno(), before.st_mode)
        os.utime(writer.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))  # the index knows it by that
        os.fsync(writer.fileno())
    half.replace(target)
    sync_folder(target.parent)
    source.unlink()
