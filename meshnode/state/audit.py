"""The audit log of a node: who asked for what kind of thing when, in files whose changes are found out.

`audit.log` in the data folder, older lines in `audit-NUMBER.log`, named by their first line. Where the chain begins
and ends is kept in the state file as well.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from meshnode.core.clock import Wall
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.state.audit_chain import MAX_LINE, Entry, Found, Link, read_line, verify, write_line
from meshnode.state.port import Records
from protocols.bucket import Bucket
from protocols.codec import at, decode, encode
from protocols.errors import MeshError, RemoteProtocolError

KIND: Final = "audit"
CURRENT: Final = "audit.log"
MAX_TEXT: Final = 100_000  # characters of a question that are kept
REFUSED_S: Final = (1.0, 60.0)  # lines about refusals in a second, and at once: a flood must not push out the others

_log = get_logger("audit")


class Audit(Protocol):
    """Where a node notes what it is asked for."""

    keeps_text: bool

    def note(self, via: str, who: str, what: str, text: str = "") -> None:
        """Somebody asked for something. `via`: http, socket, mesh. `text` is kept only if the owner wants that."""

    def refused(self, via: str, who: str, what: str) -> None:
        """Somebody asked for something and was refused."""


class NoAudit:
    """Implements `Audit` for an owner who wants none."""

    keeps_text = False

    def note(self, via: str, who: str, what: str, text: str = "") -> None:
        """See Audit."""

    def refused(self, via: str, who: str, what: str) -> None:
        """See Audit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """Where the chain begins and ends."""

    base_n: int = at(1)
    base_hash: str = at(2, limit=64)
    head_n: int = at(3)
    head_hash: str = at(4, limit=64)

    @property
    def base(self) -> Link:
        return Link(self.base_n, self.base_hash)

    @property
    def head(self) -> Link:
        return Link(self.head_n, self.head_hash)


def ends_of(state: Records) -> Ends:
    """As kept in the state file. Raises RemoteProtocolError: it can't be read."""
    data = state.record(KIND, KIND)
    return ends_of_nothing() if data is None else decode(Ends, data)


class AuditLog:
    """Implements `Audit` with files."""

    def __init__(
        self, folder: Path, state: Records, wall: Wall, health: Health, *, max_bytes: int, files: int, text: bool
    ) -> None:
        """Goes on behind the last line.

        Args:
          max_bytes: of a file; then the next one begins.
          files: kept; the oldest goes.
          text: whether questions are kept.
        """
        self.keeps_text = text
        self._folder = folder
        self._state = state
        self._wall = wall
        self._health = health
        self._max_bytes = max_bytes
        self._files = files
        self._refusals = Bucket(*REFUSED_S, wall() / 1000)
        self._missed = 0
        try:
            self._ends = ends_of(state)
            self._take_up()
        except (OSError, RemoteProtocolError) as error:
            self._ends = ends_of_nothing()
            self._complain(error)

    def note(self, via: str, who: str, what: str, text: str = "") -> None:
        """See Audit. What can't be written is told in the node's health."""
        fields: dict[str, Any] = {"at": self._wall(), "via": via, "who": who, "what": what}
        if text and self.keeps_text:
            fields["text"] = text[:MAX_TEXT]
        if self._missed:
            fields["refusals_not_noted"], self._missed = self._missed, 0
        try:
            self._append(*write_line(self._ends.head, fields))
        except (OSError, MeshError) as error:
            self._complain(error)
        else:
            self._health.clear("audit-failed")

    def refused(self, via: str, who: str, what: str) -> None:
        """See Audit."""
        if self._refusals.take(self._wall() / 1000):
            self.note(via, who, f"refused: {what}")
        else:
            self._missed += 1

    def _append(self, line: bytes, link: Link) -> None:
        path = self._folder / CURRENT
        if path.exists() and path.stat().st_size + len(line) > self._max_bytes:
            self._rotate(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            before = os.fstat(descriptor).st_size
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
        ends = self._ends
        self._keep(Ends(base_n=ends.base_n, base_hash=ends.base_hash, head_n=link.n, head_hash=link.hash))

    def _keep(self, ends: Ends) -> None:
        self._ends = ends  # it is on the disk, whatever becomes of the record
        self._state.put_record(KIND, KIND, encode(ends))

    def _rotate(self, path: Path) -> None:
        with path.open("rb") as file:
            first = file.readline(MAX_LINE)
        try:
            number = read_line(first[:-1]).link.n
        except ValueError:
            number = self._ends.head_n  # damaged: it is kept aside all the same, and `verify` tells
        path.rename(self._folder / f"audit-{number:012d}.log")
        old = older_files(self._folder)
        for gone in old[: max(0, len(old) - self._files + 1)]:
            *_, last = gone.read_bytes().splitlines()
            try:
                base = read_line(last).link
            except ValueError:
                break  # nothing that is damaged is thrown away
            ends = self._ends
            self._keep(Ends(base_n=base.n, base_hash=base.hash, head_n=ends.head_n, head_hash=ends.head_hash))
            gone.unlink()

    def _take_up(self) -> None:
        """After a crash a line may be half written, or whole and not yet known to the state file."""
        path = self._folder / CURRENT
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        try:
            last = read_line(whole.splitlines()[-1]) if whole else None
        except ValueError:
            last = None  # damaged: `verify` tells, and the chain goes on from where it was
        head = self._ends.head
        after = last is not None and last.link.n == head.n + 1 and last.prev == head.hash
        if after and last is not None:
            ends, head = self._ends, last.link
            self._keep(Ends(base_n=ends.base_n, base_hash=ends.base_hash, head_n=head.n, head_hash=head.hash))
        if len(whole) < len(data):
            if last is not None and last.link == head:
                os.truncate(path, len(whole))
            else:
                with path.open("ab") as file:
                    file.write(b"\n")

    def _complain(self, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self._health.set("audit-failed", folder=str(self._folder), reason=reason)
        _log.error("audit.failed", reason=reason)


def ends_of_nothing() -> Ends:
    """Of a log without a line."""
    none = Link()
    return Ends(base_n=none.n, base_hash=none.hash, head_n=none.n, head_hash=none.hash)


def older_files(folder: Path) -> list[Path]:
    """All but the current one, the oldest first."""
    return sorted(folder.glob("audit-*.log"))


def lines_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every line with its place and its line end, the oldest first. Raises OSError."""
    for path in (*older_files(folder), folder / CURRENT):
        if not path.exists():
            continue
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE):
                number += 1
                yield f"{path.name} line {number}", line


def verify_log(folder: Path, state: Records) -> Found:
    """Check the log of a data folder; the node may run meanwhile. Raises OSError, RemoteProtocolError."""
    ends = ends_of(state)
    return verify(lines_of(folder), ends.base, ends.head)


def entries_of(folder: Path) -> Iterator[Entry]:
    """Every line that is whole, the oldest first. Raises OSError."""
    for _, line in lines_of(folder):
        try:
            yield read_line(line.rstrip(b"\n"))
        except ValueError:
            continue
