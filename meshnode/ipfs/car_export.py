"""A model as one file: the manifest and the trees of its files as a CAR, for devices that never meet online."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from meshnode.core.errors import ConfigError, DiskError, ModelError
from meshnode.core.sizes import format_size
from meshnode.store.os_files import sync_folder, write_all
from meshnode.store.port import Content
from protocols.car.messages import OLD_CID_BYTES, Header, encode_header, section_head
from protocols.ids import DAG_PB, Cid, cid_from_bytes, cid_to_bytes
from protocols.manifest.messages import FileRef, Manifest
from protocols.protobuf import as_bytes, fields

Progress = Callable[[int, int], None]
"""(bytes of files done, bytes of files in all)."""

_LINK: Final = 2  # of a dag-pb node, which was read strictly when it came into the store
_HASH: Final = 1  # of a link
_REMEDIES: Final = {
    errno.ENOSPC: "the disk is full; free some space, or choose another place",
    errno.EDQUOT: "the disk quota of this user is used up; free some space, or choose another place",
    errno.EACCES: "permission denied; choose another place",
    errno.EPERM: "not permitted; choose another place",
    errno.EROFS: "it is mounted read-only; choose another place",
    errno.EFBIG: "the file system does not allow files of this size (FAT32 ends at 4 GB); choose another place",
    errno.EIO: "the device fails or was pulled out; try another one",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


def files_of(manifest: Manifest, variants: Iterable[str]) -> list[FileRef]:
    """The files that all variants share and those of the given ones, each once, in the order of the manifest's links.

    dag-cbor sorts keys by length, then by bytes; a walk over the whole release from its root meets the files so.
    """

    def order(name: str) -> tuple[int, str]:
        return len(name), name

    refs = [manifest.files[name] for name in sorted(manifest.files, key=order)]
    for name in sorted(set(variants), key=order):
        variant = manifest.variants[name]
        refs += [variant.head, variant.embed, variant.graph, *variant.layers]
    return list({ref.cid: ref for ref in refs}.values())


def export_car(
    store: Content,
    root: Cid,
    files: Sequence[FileRef],
    target: Path,
    *,
    replace: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write the manifest `root` and these files from the store; returns the bytes of the CAR. Blocking, streams.

    Every block is hashed on its way. The target appears when it is complete and synced, or not at all.

    Raises:
      ConfigError: the target exists and `replace` is not set, or can't be a file.
      DiskError: no room or no permission at the target.
      ModelError: a file is not (wholly) in the store, or is damaged there.
    """
    target = target.absolute()
    _check_target(target, replace)
    size = sum(ref.size for ref in files)
    part = target.with_name(f".{target.name[:200]}.{os.getpid()}.part")
    with _target_errors(target):
        free = shutil.disk_usage(target.parent).free
        if free < size:
            raise DiskError(
                f"no room for {target}: {format_size(size)} are needed, {format_size(free)} are free there; "
                "free some space, or choose another place"
            )
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        written = 0
        with _target_errors(target):
            for piece in _pieces(store, root, files, size, progress):
                write_all(descriptor, piece)
                written += len(piece)
            os.fsync(descriptor)
        _check_target(target, replace)  # somebody may have put a file there meanwhile
        with _target_errors(target):
            part.replace(target)
            sync_folder(target.parent)
    finally:
        os.close(descriptor)
        part.unlink(missing_ok=True)
    return written


def _check_target(target: Path, replace: bool) -> None:
    with _target_errors(target):
        if target.is_dir():
            raise ConfigError(f"{target} is a folder; name a file in it, as in {target / 'model.car'}")
        if not target.parent.is_dir():
            raise ConfigError(
                f"{target.parent} is no folder; make it first, or choose another place for the CAR file"
            )
        if target.exists() and not target.is_file():
            raise ConfigError(f"{target} is no plain file; choose another name for the CAR file")
        if target.exists() and not replace:
            raise ConfigError(f"{target} exists already; choose another name, or replace it with --force")


@contextmanager
def _target_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, error.strerror or str(error))
        raise DiskError(f"can't write {target}: {remedy}") from error


def _pieces(
    store: Content, root: Cid, files: Sequence[FileRef], size: int, progress: Progress | None
) -> Iterator[bytes]:
    """The bytes of the CAR, a section or a part of one at a time; each block once."""
    name = cid_to_bytes(root)
    yield encode_header(Header((name,)))
    manifest = _block(store, name)
    yield section_head(name, len(manifest))
    yield manifest
    seen = {name}
    done = 0
    for ref in files:
        waiting = [(cid_to_bytes(ref.cid), False)]
        while waiting:
            cid, old = waiting.pop()
            if cid in seen:
                continue
            seen.add(cid)
            data = _block(store, cid)
            yield section_head(cid, len(data), old=old)
            yield data
            if cid[1] == DAG_PB:
                waiting += reversed(_links(data))
        done += ref.size
        if progress is not None:
            progress(done, size)


def _links(node: bytes) -> list[tuple[bytes, bool]]:
    """(binary CIDv1, whether the node spells it as CIDv0) of every link of a dag-pb node of the store."""
    found = []
    for number, link in fields(memoryview(node)):
        if number == _LINK:
            name = next(bytes(as_bytes(at, value)) for at, value in fields(as_bytes(number, link)) if at == _HASH)
            old = len(name) == OLD_CID_BYTES
            found.append((bytes((1, DAG_PB)) + name if old else name, old))
    return found


def _block(store: Content, cid: bytes) -> bytes:
    name = cid_from_bytes(cid)
    data = store.block(name)
    if data is None:
        raise ModelError(f"the block {name} is no longer on this node; let it fetch the model again, then export it")
    if hashlib.sha256(data).digest() != cid[4:]:
        raise ModelError(
            f"the block {name} is damaged on this disk; `meshnode model verify` says which file it belongs to. "
            "Remove the model and add it again"
        )
    return data
