"""Files and blocks by content address, each file once on disk.

Layout of the folder:

    index.sqlite      which block is which range of which file (schema.py)
    sealed            is there when files are encrypted (sealed.py); their names then end in .sealed
    files/<cid>       complete, verified, read-only
    files/<cid>.part  being fetched; locked by the process that fetches it
    tmp/              files on their way in; locked by the process that adds them

Several processes may use one folder (a command adds a model while the node runs): SQLite orders their changes,
file locks, which a killed process loses, tell what is in use. File names are made of checked CIDs alone.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from meshnode.core.clock import Wall, wall_ms
from meshnode.core.errors import Declined, DiskError, ModelError
from meshnode.core.log import get_logger
from meshnode.core.sizes import format_size
from meshnode.store.cipher import Cipher
from meshnode.store.encryption import SUFFIX, check_key, is_sealed
from meshnode.store.eviction import Room
from meshnode.store.index import Index
from meshnode.store.os_files import disk_errors, is_locked, open_locked, sync_folder, write_all
from meshnode.store.partial import READ_ONLY, PartialFile, Place, Row, leaf_block
from meshnode.store.port import OpenFile, StoreUsage
from protocols.errors import MeshError, RemoteProtocolError
from protocols.ids import RAW, Cid, cid_from_bytes, cid_of, cid_to_bytes, short
from protocols.unixfs.assembly import KNOWN_SHAPES
from protocols.unixfs.builder import Builder, Tree
from protocols.unixfs.layout import CHUNK_BYTES
from protocols.unixfs.leaf import wrapped_bytes

_ANY_WRITE: Final = 0o222
_log = get_logger("content")


class BlobStore:
    """The content folder. Implements the ports `Content` and `Store`; every method may be called in any thread."""

    def __init__(self, folder: Path, quota_bytes: int, *, cipher: Cipher | None = None, wall: Wall = wall_ms) -> None:
        """Open or create the folder and tidy up what a killed process left.

        `cipher`: of the node's key; only a folder with encrypted files needs it.
        Raises DiskError (no permission, no room, an unusable index), ConfigError (no cipher, or a wrong one).
        """
        self._cipher = cipher if is_sealed(folder) else None
        check_key(folder, cipher)
        self.folder = folder
        self._wall = wall
        self._files = folder / "files"
        self._tmp = folder / "tmp"
        self._closed = False
        self._held: tuple[list[tuple[bytes]], frozenset[Cid]] = [], frozenset()
        self._held_lock = threading.Lock()
        self._used: dict[bytes, int] = {}  # CID -> time of last use, ms, not yet in the index
        with disk_errors(folder, "use the content folder"):
            for part in (folder, self._files, self._tmp):
                part.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.index = Index(folder / "index.sqlite")
            self.room = Room(folder, quota_bytes, self.index, self)
            self._tidy()

    def close(self) -> None:
        """Close the index; the store can't be used afterwards. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with self.index.transaction() as db:
            self._note_uses(db)
        self.index.close()

    # Reading

    def path(self, cid: Cid) -> Path | None:
        """The complete, verified file; None while it is not (wholly) here."""
        name = cid_to_bytes(cid)
        row = self.index.row("SELECT size, mtime_ns FROM files WHERE cid = ? AND complete = 1", (name,))
        if row is None:
            return None
        path = self.file(name)
        if not _untouched(path, *row):
            self._lost(name)
            return None
        self._use(name)
        return path

    def reveal(self, cid: Cid) -> OpenFile | None:
        """A complete file where it can be read by path: itself, or a copy in memory of an encrypted one.

        None while it is not here. Raises DiskError.
        """
        path = self.path(cid)
        if path is None or self._cipher is None:
            return None if path is None else OpenFile(path)
        name, descriptor = cid_to_bytes(cid), os.memfd_create(short(cid), os.MFD_CLOEXEC)
        try:
            with disk_errors(path, "read"), path.open("rb", buffering=0) as reader:
                at = 0
                while piece := reader.read(CHUNK_BYTES):
                    write_all(descriptor, self._cipher.apply(name, piece, at))
                    at += len(piece)
        except BaseException:
            os.close(descriptor)
            raise
        return OpenFile(Path(f"/proc/{os.getpid()}/fd/{descriptor}"), descriptor)

    def sound(self, cid: Cid) -> bool | None:
        """Whether a complete file still has the bytes of its CID, hashed as they lie on the disk; None: not here.

        One that has not, or is gone, is forgotten and deleted, so that it is fetched again; its pins stay.
        Raises DiskError, ModelError (it can't be read).
        """
        name = cid_to_bytes(cid)
        row = self.index.row("SELECT mtime_ns FROM files WHERE cid = ? AND complete = 1", (name,))
        if row is None:
            return None
        path = self.file(name)
        with disk_errors(path, "read"):
            try:
                mtime_ns = path.stat().st_mtime_ns
                good = self._tree(path, name) is not None
            except FileNotFoundError:
                good = False
        with self.index.transaction() as db, disk_errors(path, "delete"):
            if not good:
                db.execute("DELETE FROM files WHERE cid = ?", (name,))
                path.unlink(missing_ok=True)
            elif mtime_ns != row[0]:  # it was touched, or copied with the folder
                db.execute("UPDATE files SET mtime_ns = ? WHERE cid = ?", (mtime_ns, name))
        return good

    def block(self, cid: Cid) -> bytes | None:
        """Bytes of one block we hold, whatever it belongs to (a leaf, an inner node, a manifest)."""
        return self.read_blocks((cid_to_bytes(cid),))[0]

    def block_size(self, cid: bytes) -> int | None:
        """Bytes of a block that we hold under this binary CID; None if we do not."""
        place = self._leaf(cid)
        if place is not None:
            return place[2] if cid[1] == RAW else wrapped_bytes(place[2])
        row = self.index.row(
            "SELECT length(data) FROM nodes WHERE cid = ? UNION ALL SELECT length(data) FROM blocks WHERE cid = ?",
            (cid, cid),
        )
        return None if row is None else int(row[0])

    def read_blocks(self, cids: Sequence[bytes]) -> list[bytes | None]:
        """Bytes of blocks by binary CID; None for one that is gone."""
        return [self._read_block(cid) for cid in cids]

    def files(self) -> frozenset[Cid]:
        """CIDs of the complete files and blocks held; the same set as long as it says the same."""
        rows = self.index.rows("SELECT cid FROM files WHERE complete = 1 UNION SELECT cid FROM blocks")
        with self._held_lock:
            if rows != self._held[0]:
                self._held = rows, frozenset(cid_from_bytes(cid) for (cid,) in rows)
            return self._held[1]

    def version(self) -> int:
        """Another number after every change, whichever process made it."""
        return self.index.version()

    def usage(self) -> StoreUsage:
        """Bytes held (files being fetched count whole), the quota, and what is free on the disk."""
        return self.room.usage()

    # Adding

    def put_block(self, data: bytes, codec: int) -> Cid:
        """Keep a block of its own (a manifest). Raises DiskError when there is no room for it."""
        cid = cid_of(codec, data)
        name = cid_to_bytes(cid)
        with self.index.transaction() as db:
            if db.execute("SELECT 1 FROM blocks WHERE cid = ?", (name,)).fetchone() is None:
                self._make_room(db, len(data), f"a block of {len(data)} bytes")
                db.execute("INSERT INTO blocks VALUES (?, ?, ?)", (name, data, self._wall()))
        return cid

    def add_file(self, source: Path, *, pin: str) -> Cid:
        """Take a file into the store under its CID and pin it. Streams; nothing of the file stays in memory.

        A source that nobody may write to, on the same file system, is hard-linked; every other one is copied
        (so that editing it later can't spoil the store).
        Raises DiskError when there is no room, ModelError when the source can't be read.
        """
        try:
            reader = source.open("rb", buffering=0)
        except OSError as error:
            raise ModelError(f"can't read {source}: {error.strerror or error}") from error
        with reader:
            before = os.fstat(reader.fileno())
            with self.index.transaction() as db:
                self._make_room(db, before.st_size, str(source))
            with self._temporary(source, before) as (target, writer):
                changed = False
                if self._cipher is None:
                    tree = self._stream(source, reader.fileno(), writer, Builder())
                else:  # its key is made from its CID, so it is read twice
                    tree = self._stream(source, reader.fileno(), None, Builder())
                    os.lseek(reader.fileno(), 0, os.SEEK_SET)
                    first = tree
                    tree = self._stream(source, reader.fileno(), writer, Builder(), sealing=cid_to_bytes(first.root))
                    changed = tree.root != first.root
                after = os.fstat(reader.fileno())
                if changed or (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                    raise ModelError(
                        f"{source} changed while it was read; wait until it is complete and add it again"
                    )
                self._commit(target, tree, pin)
        return tree.root

    def open_partial(self, cid: Cid, size: int) -> PartialFile | Path:
        """Begin or go on with a fetch; the path when the file is complete.

        Every block left by an earlier fetch is hashed again before it counts.
        Raises DiskError (quota, no room), ModelError (no file of this size can have this CID), Declined
        `busy` when another process fetches it into the same folder.
        """
        name = cid_to_bytes(cid)
        part = self.part(name)
        with disk_errors(part, "write"):
            descriptor = open_locked(part)
        if descriptor is None:
            raise Declined("busy", f"another process is fetching {cid} into {self.folder}", retry_ms=500)
        try:
            done = self.path(cid)
            if done is not None:
                part.unlink(missing_ok=True)
                os.close(descriptor)
                return done
            number = self._begin(cid, size)
            return PartialFile(
                cid,
                size,
                row=Row(self.index, number),
                place=Place(part, self.file(name), descriptor),
                held=self._read_block,
                cover=lambda data, offset: self._cover(name, data, offset),
            )
        except RemoteProtocolError as error:
            os.close(descriptor)
            self.remove(cid)
            raise ModelError(f"{cid} can't be fetched: {error}") from error
        except MeshError:
            os.close(descriptor)
            raise

    def _begin(self, cid: Cid, size: int) -> int:
        """The row of a file that is being fetched, with room reserved for all of it."""
        name = cid_to_bytes(cid)
        with self.index.transaction() as db:
            row = db.execute("SELECT id, size FROM files WHERE cid = ?", (name,)).fetchone()
            if row is not None and row[1] == size:
                return int(row[0])
            if row is not None:
                db.execute("DELETE FROM files WHERE id = ?", (row[0],))
            self._make_room(db, size, f"{short(cid)} ({format_size(size)})")
            cursor = db.execute("INSERT INTO files VALUES (NULL, ?, ?, 0, 0, 0, ?)", (name, size, self._wall()))
            return int(cursor.lastrowid or 0)

    # Pins and eviction

    def pin(self, cid: Cid, name: str) -> None:
        """Protect a file or block from eviction under this pin name."""
        with self.index.transaction() as db:
            db.execute("INSERT OR IGNORE INTO pins VALUES (?, ?)", (name, cid_to_bytes(cid)))

    def unpin(self, name: str) -> None:
        """Drop a pin name from everything. What no other name protects may be evicted from then on."""
        self.pin_only(name, ())

    def pin_only(self, name: str, cids: Collection[Cid]) -> None:
        """Have a pin name protect these and nothing else."""
        names = [(name, cid_to_bytes(cid)) for cid in cids]
        with self.index.transaction() as db:
            db.execute("DELETE FROM pins WHERE name = ?", (name,))
            db.executemany("INSERT OR IGNORE INTO pins VALUES (?, ?)", names)

    def drop_pins(self, cids: Collection[Cid]) -> None:
        """Drop every pin of these files and blocks."""
        with self.index.transaction() as db:
            db.executemany("DELETE FROM pins WHERE cid = ?", ((cid_to_bytes(cid),) for cid in cids))

    def pins(self) -> dict[str, frozenset[Cid]]:
        """Every pin name and what it protects."""
        out: dict[str, set[Cid]] = {}
        for name, cid in self.index.rows("SELECT name, cid FROM pins"):
            out.setdefault(name, set()).add(cid_from_bytes(cid))
        return {name: frozenset(cids) for name, cids in out.items()}

    def remove(self, cid: Cid) -> None:
        """Delete a file, a partial file or a block, pinned or not. Nothing happens when it is not here."""
        name = cid_to_bytes(cid)
        with self.index.transaction() as db, disk_errors(self.file(name), "delete"):
            db.execute("DELETE FROM files WHERE cid = ?", (name,))
            db.execute("DELETE FROM blocks WHERE cid = ?", (name,))
            self.file(name).unlink(missing_ok=True)
            self.part(name).unlink(missing_ok=True)

    def remove_unpinned(self) -> int:
        """Delete everything that no pin protects and nobody is fetching; returns the bytes that came free."""
        with self.index.transaction() as db:
            before = self.room.used_bytes(db)
            for name, _ in self.room.evictable(db):
                self.room.evict(db, name)
            return before - self.room.used_bytes(db)

    # Inside

    def file(self, name: bytes) -> Path:
        """Where the complete file of a binary CID lies."""
        return self._files / (cid_from_bytes(name) + (SUFFIX if self._cipher else ""))

    def part(self, name: bytes) -> Path:
        """Where it lies while it is fetched."""
        return self._files / f"{self.file(name).name}.part"

    def _cover(
        self, name: bytes, data: bytes | bytearray | memoryview, offset: int
    ) -> bytes | bytearray | memoryview:
        """A piece of a file as it stands on the disk, or the other way round."""
        return data if self._cipher is None else self._cipher.apply(name, data, offset)

    def _leaf(self, cid: bytes) -> tuple[bytes, int, int, bool, int, int] | None:
        """(CID, offset, length, complete, size and mtime of the file) of a leaf that is a range of a file."""
        row = self.index.row(
            "SELECT files.cid, files.size, files.chunk, files.complete, files.mtime_ns, leaves.position FROM leaves "
            "JOIN files ON files.id = leaves.file WHERE leaves.cid = ? ORDER BY files.complete DESC LIMIT 1",
            (cid,),
        )
        if row is None:
            return None
        name, size, chunk, complete, mtime_ns, position = row
        offset = position * chunk
        return name, offset, min(chunk, size - offset), bool(complete), size, mtime_ns

    def _read_block(self, cid: bytes) -> bytes | None:
        place = self._leaf(cid)
        if place is None:
            row = self.index.row(
                "SELECT data FROM nodes WHERE cid = ? UNION ALL SELECT data FROM blocks WHERE cid = ?", (cid, cid)
            )
            return None if row is None else bytes(row[0])
        name, offset, length, complete, size, mtime_ns = place
        path = self.file(name) if complete else self.part(name)
        with disk_errors(path, "read"):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self._lost(name)
                return None
            try:
                status = os.fstat(descriptor)
                if complete and (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
                    # Somebody wrote into it. Whoever got changed bytes from us would drop us.
                    self._lost(name)
                    return None
                data = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        self._use(name)
        return leaf_block(cid, bytes(self._cover(name, data, offset))) if len(data) == length else None

    def _lost(self, name: bytes) -> None:
        """A file was deleted or changed by somebody else: forget it, so that it is fetched again."""
        with self.index.transaction() as db:
            row = db.execute("SELECT size, mtime_ns FROM files WHERE cid = ? AND complete = 1", (name,)).fetchone()
            path = self.file(name)
            if row is not None and not _untouched(path, *row):
                reason = "somebody wrote into it" if path.exists() else "somebody deleted it"
                _log.warning(
                    "file.dropped", cid=cid_from_bytes(name), path=str(path), size_bytes=row[0], reason=reason
                )
                db.execute("DELETE FROM files WHERE cid = ?", (name,))
                path.unlink(missing_ok=True)

    def _use(self, name: bytes) -> None:
        """Remember in memory that a file was used; it reaches the index with the next change of it."""
        self._used[name] = self._wall()

    def _note_uses(self, db: sqlite3.Connection) -> None:
        used, self._used = self._used, {}
        rows = [(when, name) for name, when in used.items()]
        db.executemany("UPDATE files SET used_ms = ? WHERE cid = ?", rows)
        db.executemany("UPDATE blocks SET used_ms = ? WHERE cid = ?", rows)

    def _make_room(self, db: sqlite3.Connection, size: int, what: str) -> None:
        """Raises DiskError: no room, or the store was encrypted or decrypted meanwhile."""
        self._check_switch()
        self._note_uses(db)
        self.room.make(db, size, what)

    def _check_switch(self) -> None:
        """Raises DiskError when files have been encrypted, or are no longer, since this store was opened."""
        if is_sealed(self.folder) != (self._cipher is not None):
            raise DiskError(
                f"content.encrypt was switched, and the node of {self.folder} started, in the meantime; start this "
                "command again"
            )

    @contextmanager
    def _temporary(self, source: Path, status: os.stat_result) -> Iterator[tuple[Path, int | None]]:
        """A name in `tmp/` for a source: a hard link (descriptor None) or a locked empty file to copy into."""
        linked = None
        # Made and locked in one transaction: nobody tidies up in between.
        with self.index.transaction(), disk_errors(self._tmp, "write into"):
            if self._cipher is None and not status.st_mode & _ANY_WRITE and status.st_dev == self._tmp.stat().st_dev:
                linked = self._linked(source)
            if linked is None:
                descriptor, name = tempfile.mkstemp(dir=self._tmp)
                target = Path(name)
            else:
                target = linked
                descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        try:
            yield target, None if linked else descriptor
        finally:
            os.close(descriptor)
            target.unlink(missing_ok=True)

    def _linked(self, source: Path) -> Path | None:
        """A hard link to a read-only file; None where the file system or its rules do not allow one."""
        target = self._tmp / f"{os.getpid()}-{threading.get_ident()}.link"
        target.unlink(missing_ok=True)
        try:
            target.hardlink_to(source)
        except OSError:
            return None
        return target

    def _stream(
        self,
        source: Path,
        reader: int,
        writer: int | None,
        builder: Builder,
        *,
        sealing: bytes = b"",
        sealed: bytes = b"",
    ) -> Tree:
        """Hash a file; copy it to `writer` if there is one. `sealing`: its CID, when the copy is to be encrypted;
        `sealed`: when the source is."""
        buffer = memoryview(bytearray(CHUNK_BYTES))
        at = 0
        while True:
            try:
                count = os.readv(reader, (buffer,))
            except OSError as error:
                raise ModelError(f"can't read {source}: {error.strerror or error}") from error
            if not count:
                break
            piece = self._cover(sealed, buffer[:count], at) if sealed else buffer[:count]
            builder.update(piece)
            if writer is not None:
                with disk_errors(self.folder, "write into"):
                    write_all(writer, self._cover(sealing, piece, at) if sealing else piece)
            at += count
        if writer is not None:
            with disk_errors(self.folder, "write into"):
                os.fchmod(writer, READ_ONLY)
                os.fsync(writer)
        return builder.finish()

    def _commit(self, source: Path, tree: Tree, pin: str | None) -> None:
        """Move a complete file into place and into the index, both or neither."""
        name = cid_to_bytes(tree.root)
        with self.index.transaction() as db:
            self._check_switch()
            if pin is not None:
                db.execute("INSERT OR IGNORE INTO pins VALUES (?, ?)", (pin, name))
            row = db.execute("SELECT complete, size, mtime_ns FROM files WHERE cid = ?", (name,)).fetchone()
            if row is not None and row[0] and _untouched(self.file(name), *row[1:]):
                return
            db.execute("DELETE FROM files WHERE cid = ?", (name,))
            with disk_errors(self._files, "write into"):
                source.replace(self.file(name))
                mtime_ns = self.file(name).stat().st_mtime_ns
                sync_folder(self._files)
            cursor = db.execute(
                "INSERT INTO files VALUES (NULL, ?, ?, ?, 1, ?, ?)",
                (name, tree.layout.size, tree.layout.chunk, mtime_ns, self._wall()),
            )
            number = cursor.lastrowid
            db.executemany(
                "INSERT OR IGNORE INTO leaves VALUES (?, ?, ?)",
                ((cid, number, position) for position, cid in enumerate(tree.leaves)),
            )
            db.executemany(
                "INSERT OR IGNORE INTO nodes VALUES (?, ?, ?)", ((number, cid, data) for cid, data in tree.inner)
            )

    def _tidy(self) -> None:
        """Bring index and folder together after a kill: nothing is in one and not in the other."""
        with self.index.transaction() as db:
            known = dict(db.execute("SELECT cid, complete FROM files").fetchall())
            for path in sorted(self._tmp.iterdir()):
                if not is_locked(path):
                    path.unlink(missing_ok=True)
            for path in sorted(self._files.iterdir()):
                name = _name_of(path)
                partial = path.suffix == ".part"
                if name is None or (partial and known.get(name) != 0 and not is_locked(path)):
                    path.unlink(missing_ok=True)
                elif not partial and not known.get(name) and path == self.file(name):
                    self._adopt(path, name)
            for name, complete in known.items():
                if complete and not any(
                    (self._files / (cid_from_bytes(name) + end)).exists() for end in ("", SUFFIX)
                ):
                    db.execute("DELETE FROM files WHERE cid = ?", (name,))

    def _adopt(self, path: Path, name: bytes) -> None:
        """A whole file that the index does not know: killed before the commit, or the index was deleted."""
        tree = self._tree(path, name)
        if tree is None:
            path.unlink()
        else:
            self._commit(path, tree, None)

    def _tree(self, path: Path, name: bytes) -> Tree | None:
        """The DAG of a file of ours under its CID, hashed anew; None when its bytes have another one."""
        for shape in KNOWN_SHAPES:
            builder = Builder(**shape._asdict())
            with path.open("rb", buffering=0) as reader:
                tree = self._stream(path, reader.fileno(), None, builder, sealed=name if self._cipher else b"")
            if cid_to_bytes(tree.root) == name:
                return tree
        return None


def _name_of(path: Path) -> bytes | None:
    try:
        return cid_to_bytes(path.name.removesuffix(".part").removesuffix(SUFFIX))
    except RemoteProtocolError:
        return None


def _untouched(path: Path, size: int, mtime_ns: int) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (size, mtime_ns)
