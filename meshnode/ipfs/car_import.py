"""A model out of a CAR file: every block is hashed on its way, files go into the store like fetched ones.

A release is registered when all of it is there: until then its files lie in the store like those of a fetch
that was stopped, found again by the next import or fetch, and evicted when room is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshnode.core.errors import ConfigError, Declined, ModelError
from meshnode.store.port import Partial, Store
from protocols.car.machine import Reader
from protocols.car.messages import Block, Header
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, Cid, cid_from_bytes, cid_to_bytes
from protocols.manifest.codec import NotAManifest, open_manifest
from protocols.manifest.messages import FileRef, Manifest

READ_BYTES: Final = 1 << 20
MAX_OPEN: Final = 128  # files that are put together at once; more wait for another pass over the CAR

Progress = Callable[[int, int], None]
"""(bytes of the CAR read in this pass, bytes of the CAR)."""


@dataclass(frozen=True, slots=True)
class Imported:
    cid: Cid  # of the manifest
    manifest: Manifest
    variants: tuple[str, ...]  # those that are here whole, smallest first


def import_car(store: Store, source: Path, *, progress: Progress | None = None) -> Imported:
    """Take the release in a CAR file into the store and pin it under its manifest's CID. Blocking, streams.

    Blocks may come in any order; one pass is enough when none stands before its parent, as in our own exports.

    Raises:
      ModelError: no CAR, damaged, cut off, not a signed release, or without one whole variant.
      DiskError: the store has no room.
      Declined: `busy`, another process is fetching a file of it into the same store.
    """
    work = _Import(store, source)
    try:
        while work.read(progress):
            pass
        return work.finish()
    finally:
        work.close()


def _items(source: Path, progress: Progress | None) -> Iterator[Header | Block]:
    """What a CAR file holds. Raises ModelError: unreadable, damaged, cut off, or no CAR."""
    reader = Reader()
    try:
        with source.open("rb", buffering=0) as file:
            size, done = os.fstat(file.fileno()).st_size, 0
            while data := file.read(READ_BYTES):
                reader.feed(data)
                done += len(data)
                while (item := reader.next()) is not None:
                    yield item
                if progress is not None:
                    progress(done, max(size, done))
        reader.finish()
    except RemoteProtocolError as error:
        raise ModelError(
            f"{source} can't be imported: {error}. Copy it again, or export it again where it comes from."
        ) from error
    except IsADirectoryError as error:
        raise ModelError(
            f"{source} is a folder; name one file that `meshnode model export NAME --car FILE` has made. A folder "
            f"with a model is published with: meshnode model add {source}"
        ) from error
    except OSError as error:
        raise ConfigError(f"the file {source} can't be read: {error.strerror or error}") from error


class _Import:
    """What is known and what is still missing, between passes over the file."""

    def __init__(self, store: Store, source: Path) -> None:
        self._store = store
        self._source = source
        self._root = b""
        self._block = b""  # the manifest as it was signed
        self._manifest: Manifest | None = None
        self._roots: dict[bytes, FileRef] = {}  # files whose root block has not come by
        self._open: dict[Cid, Partial] = {}
        self._wanted: dict[bytes, set[Cid]] = {}  # block -> open files that miss it
        self._busy: Declined | None = None

    def read(self, progress: Progress | None) -> bool:
        """One pass over the file; whether another one may bring more."""
        items = _items(self._source, progress)
        header = next(items)
        assert isinstance(header, Header)
        self._check_roots(header)
        news = missed = False
        for item in items:
            assert isinstance(item, Block)
            if item.cid == self._root and self._manifest is None:
                self._begin(item.data)
                news = True
            missed |= self._manifest is None
            if item.cid in self._roots:
                opened = self._open_file(self._roots[item.cid])
                news |= opened
                missed |= not opened
            for cid in self._wanted.pop(item.cid, ()):
                news |= self._write(cid, item)
        return news and (missed or bool(self._open))

    def finish(self) -> Imported:
        """Register the release. Raises ModelError when no variant is whole."""
        manifest = self._manifest
        if manifest is None:
            raise ModelError(f"{self._source} can't be imported: it lacks the manifest {cid_from_bytes(self._root)}")
        here = {cid for cid in manifest.all_files() if self._store.path(cid) is not None}
        needed = {name: {ref.cid for ref in manifest.files_of(name)} for name in manifest.variants}
        whole = [name for name in needed if needed[name] <= here]
        if not whole:
            if self._busy is not None:
                raise self._busy
            name, missing = min(
                ((name, files - here) for name, files in needed.items()), key=lambda pair: len(pair[1])
            )
            raise ModelError(
                f"{self._source} can't be imported: it holds no variant of {manifest.name} {manifest.version} whole "
                f"(of {name}, {len(missing)} of {len(needed[name])} files are missing, {min(missing)} among them). "
                "Export it again where it comes from."
            )
        root = self._store.put_block(self._block, DAG_CBOR)
        for cid in (root, *sorted(set().union(*(needed[name] for name in whole)))):
            self._store.pin(cid, root)
        layers = manifest.architecture.layers
        whole.sort(key=lambda name: (name not in manifest.servable, manifest.variants[name].span_bytes(0, layers)))
        return Imported(root, manifest, tuple(whole))

    def close(self) -> None:
        """Close what is open and drop the pins of this import; those of the release stay."""
        for partial in self._open.values():
            partial.close()
        if self._manifest is not None:
            self._store.unpin(self._pin)

    @property
    def _pin(self) -> str:
        """Holds the files until the release does; named so that a killed import's is dropped by the next one."""
        return f"import {cid_from_bytes(self._root)}"

    def _check_roots(self, header: Header) -> None:
        if len(header.roots) != 1 or header.roots[0][1] != DAG_CBOR or self._root not in (b"", header.roots[0]):
            raise ModelError(
                f"{self._source} is no exported model: its root is not the one manifest of a release. Make such a "
                "file with: meshnode model export NAME --car FILE"
            )
        self._root = header.roots[0]

    def _begin(self, block: bytes) -> None:
        try:
            self._manifest = open_manifest(block)
        except NotAManifest as error:
            raise ModelError(
                f"{self._source} is no exported model: its root is no meshnode manifest. {error} Make such a file "
                "with: meshnode model export NAME --car FILE"
            ) from error
        except RemoteProtocolError as error:
            raise ModelError(f"{self._source} is no exported model: {error}") from error
        self._block = block
        for ref in self._manifest.files_of(*self._manifest.variants):
            path = self._store.path(ref.cid)
            if path is None:
                self._roots[cid_to_bytes(ref.cid)] = ref
                continue
            if (size := path.stat().st_size) != ref.size:
                raise ModelError(
                    f"{self._source} can't be imported: its manifest states {ref.size} bytes for {ref.cid}, which "
                    f"has {size}. Whoever published it gave a wrong size; publish it again"
                )
            self._store.pin(ref.cid, self._pin)

    def _open_file(self, ref: FileRef) -> bool:
        """Begin a file whose root comes by, before the root is written; whether that was possible."""
        if len(self._open) >= MAX_OPEN:
            return False
        try:
            partial = self._store.open_partial(ref.cid, ref.size)
        except Declined as busy:
            self._busy = busy
            return False
        del self._roots[cid_to_bytes(ref.cid)]
        self._store.pin(ref.cid, self._pin)
        if isinstance(partial, Path):
            return True
        self._open[ref.cid] = partial
        for cid in partial.wanted():
            self._wanted.setdefault(cid, set()).add(ref.cid)
        self._close_complete(ref.cid)
        return True

    def _write(self, cid: Cid, block: Block) -> bool:
        partial = self._open.get(cid)
        if partial is None:
            return False  # the store had the block from another file, and the file is complete
        for wanted in partial.write([(block.cid, block.data)]):
            self._wanted.setdefault(wanted, set()).add(cid)
        self._close_complete(cid)
        return True

    def _close_complete(self, cid: Cid) -> None:
        if self._open[cid].complete:
            self._open.pop(cid).finish()
