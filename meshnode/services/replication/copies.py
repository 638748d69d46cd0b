"""Keeps enough copies of every file of the served model in the mesh, and protects those that must not go.

Every node computes who makes which missing copy (`policy/replication.py`) from the adverts and makes its own share.
Nobody announces anything: a copy shows in the advert when it is there. Where a node does not do its part, the next
in rank does it after a while.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Final

import trio

from meshnode.core.errors import ContentUnavailable, Declined, DiskError, FatalError, TransientError
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes, Watch
from meshnode.core.sizes import counted, format_size
from meshnode.model.release import ServedRelease
from meshnode.policy.replication import Shelf, assignments, copies
from meshnode.services.port import Content, Directory, Load, Opening, Releases
from meshnode.services.replication.shelves import HANDOVER, Shelves
from protocols.errors import ProtocolError
from protocols.ids import Cid, PeerId, cid_to_bytes, short
from protocols.manifest.messages import FileRef

GATHER_S: Final = 1.0  # what changes within this time is looked at once
LOOK_S: Final = 1.0  # between looks while copies are to be made: time alone makes them due, and somebody late
SETTLE_S: Final = 10.0  # a file must lack copies this long: nodes that start together fetch their layers first
LATE_S: Final = 30.0  # without a copy from those whose part it is; after each, one more node makes it
LATE_RATE: Final = 5_000_000  # bytes per second that a slow node fetches; a large file may take longer by that
REST_S: Final = 30.0  # after a file could not be fetched
HANDOVER_S: Final = 15.0  # most time that leaving waits for the copies
LAST_PAUSE_S: Final = 30.0  # most between two files while somebody waits for an answer of ours

_log = get_logger("replication")


@dataclass(frozen=True, slots=True)
class Copies:
    """How many copies of the served model's files there are."""

    wanted: int  # as the setting says, or as many as there are nodes
    nodes: int
    of_file: Mapping[Cid, int]
    planned: int = 0  # files with too few copies of which somebody is to make one

    @property
    def fewest(self) -> int:
        return min(self.of_file.values(), default=0)

    @property
    def short(self) -> tuple[Cid, ...]:
        """Files with too few copies."""
        return tuple(cid for cid, count in self.of_file.items() if count < self.wanted)


@dataclass(frozen=True, slots=True)
class Duties:
    """What goes before copies."""

    spans: Opening  # while this node fetches layers in order to serve them, it makes none
    load: Load  # while somebody waits for tokens of ours, it fetches half of the time at most


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationSettings:
    """How many copies, and when."""

    replicas: int  # of every file, that the mesh is to keep
    settle_s: float = SETTLE_S


class ReplicationService:
    """Makes our share of the missing copies, one file at a time."""

    name = "replication"

    def __init__(
        self,
        directory: Directory,
        shelves: Shelves,
        releases: Releases,
        content: Content,
        duties: Duties,
        settings: ReplicationSettings,
        health: Health,
    ) -> None:
        self._us = shelves.us
        self._directory = directory
        self._shelves = shelves
        self._releases = releases
        self._content = content
        self._duties = duties
        self._replicas = settings.replicas
        self._settle_s = settings.settle_s
        self._health = health
        self._short_since: dict[bytes, float] = {}
        self._rests_until: dict[bytes, float] = {}
        self._trouble = ""
        self._copies: Copies | None = None
        self._opened: ServedRelease | None = None
        self._files: dict[bytes, FileRef] = {}  # of the served model
        self._plan: dict[PeerId, list[bytes]] = {}
        self._counted: tuple[object, dict[bytes, int]] = (None, {})
        self._grew: dict[PeerId, tuple[int, float]] = {}  # files of the model that a node holds, and since when
        self._looked = Changes()
        self._leaving = False
        self._copying = trio.CancelScope()

    def copies(self) -> Copies | None:
        """As last counted; None without a model."""
        return self._copies

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look and fetch until cancelled."""
        watch = Watch(self._directory.changes, self._shelves.inventory.changes, self._releases.changes)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._copy_forever)
            task_status.started()
            while True:
                self._look()
                with trio.move_on_after(LOOK_S if self._plan else inf):
                    await watch.next()
                    await trio.sleep(GATHER_S)

    async def _copy_forever(self) -> None:
        """Make our copies, one after the other. What is protected doesn't wait for that."""
        while True:
            version, began = self._looked.version, trio.current_time()
            name = self._due()
            if name is None:
                await self._looked.wait(version)
                continue
            made = False
            with trio.CancelScope() as self._copying:
                made = await self._copy(self._files[name], name)
            if made:
                self._look()
                if self._duties.load.sessions:
                    await trio.sleep(min(LAST_PAUSE_S, trio.current_time() - began))

    async def drain(self, limit_s: float = HANDOVER_S) -> None:
        """Before leaving: wait until others hold what only we hold, if they have room, at most `limit_s` seconds.

        If cancelled: nobody counts our copies any more.
        """
        self._leaving = True
        if not self._only_here():
            return
        _log.info("copies.handing_over", files=len(self._only_here()))
        me = self._directory.me()
        self._directory.advertise(replace(me, tags=(*me.tags, HANDOVER)))
        with trio.move_on_after(limit_s):
            while self._only_here():
                await self._directory.changes.wait()
        if left := self._only_here():
            _log.warning("copies.lost", files=len(left), reason="nobody took them over in time")

    def _only_here(self) -> list[bytes]:
        """Files that leave the mesh with us although somebody else has room for them."""
        release = self._releases.current
        if release is None:
            return []
        *others, ours = self._shelves.all()
        held = {name for shelf in others for name in shelf.files}
        missing = {
            name: file.size for name, file in _files_of(release).items() if name in ours.files and name not in held
        }
        return [name for names in assignments(missing, others, 1).values() for name in names]

    def _look(self) -> None:
        """Count, protect, plan and report."""
        now = trio.current_time()
        release = self._releases.current
        self._looked.notify()
        if release is None:
            # What was protected stays so: after a start, nobody knows yet what the network serves.
            self._copies = None
            self._opened, self._files, self._plan = None, {}, {}
            self._short_since.clear()
            self._health.clear("few-copies")
            return
        shelves = self._shelves.all()
        if self._shelves.resting:
            self._copying.cancel()  # what has come of the file stays
        self._shelves.protect(shelves, self._replicas)
        if self._opened != release:
            self._opened, self._files = release, _files_of(release)
        count = self._count(shelves)
        self._copies = Copies(
            min(self._replicas, len(shelves)), len(shelves), {file.cid: count[n] for n, file in self._files.items()}
        )
        short = [name for name in self._files if count[name] < self._copies.wanted]
        self._short_since = {name: self._short_since.get(name, now) for name in short}
        self._plan = self._planned(shelves, now) if short else {}
        planned = {name for names in self._plan.values() for name in names}
        self._copies = replace(self._copies, planned=len(planned.intersection(short)))
        if not short:
            self._trouble = ""
        self._report(release)

    def _count(self, shelves: list[Shelf]) -> dict[bytes, int]:
        """Copies of each file of the model. Most looks find the same files in the same places."""
        key = (self._files.keys(), [shelf.files for shelf in shelves])
        if self._counted[0] != key:
            self._counted = (key, copies(self._files, shelves))
        return self._counted[1]

    def _planned(self, shelves: list[Shelf], now: float) -> dict[PeerId, list[bytes]]:
        """Who makes which missing copy. Whoever gets on with its part is not late."""
        sizes = {name: file.size for name, file in self._files.items()}
        self._note_growth(shelves, now)
        plan = assignments(sizes, shelves, self._replicas)
        moved: dict[bytes, float] = {}
        for peer, names in plan.items():
            for name in names:
                moved[name] = min(moved.get(name, now), self._grew[peer][1])
        late: dict[bytes, int] = {}
        for name, since in self._short_since.items():
            waited = now - max(since + self._settle_s, moved.get(name, 0.0))
            rounds = int(waited // (LATE_S + sizes[name] / LATE_RATE))
            if rounds > 0:
                late[name] = rounds
        return assignments(sizes, shelves, self._replicas, late) if late else plan

    def _note_growth(self, shelves: list[Shelf], now: float) -> None:
        wanted = frozenset(self._files)
        grew: dict[PeerId, tuple[int, float]] = {}
        for shelf in shelves:
            held = len(shelf.files & wanted)
            before, since = self._grew.get(shelf.peer, (held, -inf))
            grew[shelf.peer] = (held, now if held > before else since)
        self._grew = grew

    def _due(self) -> bytes | None:
        """The file that we are to fetch now."""
        if self._duties.spans.loading is not None or self._leaving:
            return None
        now, urgent = trio.current_time(), self._shelves.urgent()
        for name in self._plan.get(self._us, ()):
            settled = urgent or now - self._short_since[name] >= self._settle_s
            if settled and now >= self._rests_until.get(name, 0.0):
                return name
        return None

    async def _copy(self, file: FileRef, name: bytes) -> bool:
        """Fetch one file. What goes wrong is shown and tried again later."""
        try:
            await self._content.fetch(file)
        except (TransientError, Declined, FatalError, ProtocolError) as error:
            self._trouble = str(error)
            rest = [name]
            if isinstance(error, DiskError):
                rest = list(self._short_since)  # nor will another file find room
            elif not isinstance(error, ContentUnavailable):
                _log.warning("copy.failed", cid=file.cid, reason=str(error))
            until = trio.current_time() + REST_S
            self._rests_until |= dict.fromkeys(rest, until)
            return False
        self._trouble = ""
        self._rests_until[name] = trio.current_time() + REST_S
        self._shelves.protect_new(file.cid)
        _log.info("copy.made", cid=short(file.cid), size_bytes=file.size)
        return True

    def _report(self, release: ServedRelease) -> None:
        """Say so when copies are missing that nobody is about to make."""
        assert self._copies is not None
        planned = {name for names in self._plan.values() for name in names}
        homeless = [self._files[name] for name in self._short_since if name not in planned]
        if homeless:
            missing = format_size(sum(file.size for file in homeless))
            reason = f"no other node has room for them ({missing})"
        else:
            reason = self._trouble
        if self._copies.short and reason:
            self._health.set(
                "few-copies",
                files=counted(len(self._copies.short), "file"),
                model=release.manifest.name,
                fewest=self._copies.fewest,
                wanted=self._copies.wanted,
                reason=reason,
            )
        else:
            self._health.clear("few-copies")


def _files_of(release: ServedRelease) -> dict[bytes, FileRef]:
    """What serving and asking need: binary CID -> file. The manifest itself is with everybody."""
    return {cid_to_bytes(file.cid): file for file in release.manifest.files_of(release.variant_name)}
