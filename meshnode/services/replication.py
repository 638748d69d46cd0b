"""Keeps enough copies of every file of the served model in the mesh, and protects those that must not go.

Every node computes who makes which missing copy (`policy/replication.py`) from the adverts and makes its own share.
Nobody announces anything: a copy shows in the advert when it is there. Where a node does not do its part, the next
in rank does it after a while.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from typing import Final, Protocol

import trio

from meshnode.core.errors import ContentUnavailable, Declined, DiskError, FatalError, TransientError
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.sizes import format_size
from meshnode.policy.replication import Shelf, Standing, assignments, copies, standing
from meshnode.services.port import Directory
from meshnode.store.port import LAST_PIN, SPARE_PIN, Content
from protocols.advert.messages import DRAINING, Advert, Head, Holding
from protocols.errors import ProtocolError
from protocols.ids import DAG_CBOR, Cid, PeerId, cid_from_bytes, cid_to_bytes, short
from protocols.manifest.messages import FileRef, Manifest

LOOK_SECONDS: Final = 1.0  # between looks at the mesh
SETTLE_SECONDS: Final = 10.0  # a file must lack copies this long: nodes that start together fetch their layers first
LATE_SECONDS: Final = 30.0  # without a copy from those whose part it is; after each, one more node makes it
LATE_RATE: Final = 5_000_000  # bytes per second that a slow node fetches; a large file may take longer by that
REST_SECONDS: Final = 30.0  # after a file could not be fetched
HANDOVER: Final = "handing-over"  # tag of a node that leaves and holds what nobody else does
HANDOVER_SECONDS: Final = 15.0  # most time that leaving waits for the copies
LOW_DISK_BYTES: Final = 256 << 20  # less room on the disk is worth a word
LAST_PAUSE_SECONDS: Final = 30.0  # most between two files while somebody waits for an answer of ours

_MANIFEST: Final = bytes((1, DAG_CBOR))  # begins the CID of one

_text_of = lru_cache(maxsize=8192)(cid_from_bytes)

_log = get_logger("replication")


class Fetch(Protocol):
    def __call__(self, cid: Cid, size: int) -> Awaitable[object]:
        """Have the complete, verified file in the store."""


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


class ReplicationService:
    """Makes our share of the missing copies, one file at a time."""

    name = "replication"

    def __init__(
        self,
        *,
        us: PeerId,
        directory: Directory,
        release: Callable[[], tuple[Head, Manifest] | None],
        holdings: Callable[[], tuple[Holding, ...]],
        store: Content,
        fetch: Fetch,
        replicas: int,
        loading: Callable[[], bool],
        busy: Callable[[], bool],
        health: Health,
        settle_s: float = SETTLE_SECONDS,
    ) -> None:
        """
        Args:
          release: what the network serves, with its manifest.
          holdings: what we hold now, before our advert says so.
          replicas: copies of every file that the mesh is to keep.
          loading: whether this node fetches layers in order to serve them, which goes first.
          busy: whether somebody waits for tokens of ours; then we fetch half of the time at most.
        """
        self._us = us
        self._directory = directory
        self._release = release
        self._holdings = holdings
        self._store = store
        self._fetch = fetch
        self._replicas = replicas
        self._loading = loading
        self._busy = busy
        self._health = health
        self._settle_s = settle_s
        self._short_since: dict[bytes, float] = {}
        self._rests_until: dict[bytes, float] = {}
        self._trouble = ""
        self._pinned: dict[Standing, frozenset[Cid]] = {}
        self._judged: object = None
        self._copies: Copies | None = None
        self._opened: tuple[Head, Manifest] | None = None
        self._files: dict[bytes, FileRef] = {}  # of the served model
        self._plan: dict[PeerId, list[bytes]] = {}
        self._names: dict[PeerId, tuple[tuple[Holding, ...], frozenset[bytes]]] = {}  # of each advert, taken apart
        self._counted: tuple[object, dict[bytes, int]] = (None, {})
        self._grew: dict[PeerId, tuple[int, float]] = {}  # files of the model that a node holds, and since when
        self._looked = trio.Event()
        self._leaving = False

    def copies(self) -> Copies | None:
        """As last counted; None without a model."""
        return self._copies

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look and fetch until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._copy_forever)
            task_status.started()
            while True:
                self._look()
                await trio.sleep(LOOK_SECONDS)

    async def _copy_forever(self) -> None:
        """Make our copies, one after the other. What is protected doesn't wait for that."""
        while True:
            began = trio.current_time()
            name = self._due()
            if name is None:
                await self._looked.wait()
            elif await self._copy(self._files[name], name):
                self._look()
                if self._busy():
                    await trio.sleep(min(LAST_PAUSE_SECONDS, trio.current_time() - began))

    async def drain(self, limit_s: float = HANDOVER_SECONDS) -> None:
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
        release = self._release()
        if release is None:
            return []
        *others, ours = self._shelves()
        held = {name for shelf in others for name in shelf.files}
        missing = {
            name: file.size for name, file in _files_of(*release).items() if name in ours.files and name not in held
        }
        return [name for names in assignments(missing, others, 1).values() for name in names]

    def _look(self) -> None:
        """Count, protect, plan and report."""
        self._looked.set()
        self._looked = trio.Event()
        now = trio.current_time()
        self._watch_quota()
        release = self._release()
        if release is None:
            # What was protected stays so: after a start, nobody knows yet what the network serves.
            self._copies = None
            self._opened, self._files, self._plan = None, {}, {}
            self._short_since.clear()
            self._health.clear("few-copies")
            return
        shelves = self._shelves()
        self._protect(shelves)
        if self._opened != release:
            self._opened, self._files = release, _files_of(*release)
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
        self._report(release[1])

    def _watch_quota(self) -> None:
        """It was lowered, or its share of the disk shrank, below what may not go."""
        usage = self._store.usage()
        if usage.used_bytes > usage.quota_bytes:
            held, quota = format_size(usage.used_bytes), format_size(usage.quota_bytes)
            self._health.set("quota-exceeded", held=held, quota=quota)
        else:
            self._health.clear("quota-exceeded")
        if usage.free_disk_bytes < LOW_DISK_BYTES:
            self._health.set("disk-low", free=format_size(usage.free_disk_bytes))
        else:
            self._health.clear("disk-low")

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
            rounds = int(waited // (LATE_SECONDS + sizes[name] / LATE_RATE))
            if rounds:
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
        if self._loading() or self._leaving:
            return None
        now = trio.current_time()
        urgent = any(HANDOVER in advert.tags for advert in self._directory.live().values())
        for name in self._plan.get(self._us, ()):
            settled = urgent or now - self._short_since[name] >= self._settle_s
            if settled and now >= self._rests_until.get(name, 0.0):
                return name
        return None

    def _shelves(self) -> list[Shelf]:
        """Who holds what. Our own part as it is, not as our last advert says."""
        live = self._directory.live()
        self._names = {peer: names for peer, names in self._names.items() if peer in live}
        shelves = [
            Shelf(
                peer,
                self._names_of(peer, advert.holdings),
                advert.disk_free_bytes,
                steady="battery" not in advert.tags,
            )
            for peer, advert in live.items()
            if peer != self._us and not _goes(advert)
        ]
        me = live.get(self._us)
        battery = me is not None and "battery" in me.tags
        ours = self._names_of(self._us, self._holdings())
        return [*shelves, Shelf(self._us, ours, self._store.usage().room_bytes, steady=not battery)]

    def _names_of(self, peer: PeerId, holdings: tuple[Holding, ...]) -> frozenset[bytes]:
        """The same set as long as it says the same: an advert is renewed far more often than it changes."""
        known = self._names.get(peer)
        if known is None or known[0] != holdings:
            known = (holdings, frozenset(name for holding in holdings for name in holding.cids))
        else:
            known = (holdings, known[1])
        self._names[peer] = known
        return known[1]

    def _protect(self, shelves: list[Shelf]) -> None:
        """Pin what must not be evicted here: it outlives a restart, when we know of nobody yet."""
        holders = [(shelf.peer, shelf.files) for shelf in shelves]
        if holders == self._judged:
            return
        self._judged = holders
        pins: dict[Standing, set[Cid]] = {Standing.LAST: set(), Standing.SPARE: set(), Standing.FREE: set()}
        for name in shelves[-1].files:
            others = [peer for peer, files in holders if peer != self._us and name in files]
            manifest = name.startswith(_MANIFEST)  # small, and without it a restart knows of no file
            what = Standing.LAST if manifest else standing(name, self._us, others, self._replicas)
            pins[what].add(_text_of(name))
        for kind, pin in ((Standing.LAST, LAST_PIN), (Standing.SPARE, SPARE_PIN)):
            if self._pinned.get(kind) != frozenset(pins[kind]):
                self._store.pin_only(pin, pins[kind])
                self._pinned[kind] = frozenset(pins[kind])

    async def _copy(self, file: FileRef, name: bytes) -> bool:
        """Fetch one file. What goes wrong is shown and tried again later."""
        try:
            await self._fetch(file.cid, file.size)
        except (TransientError, Declined, FatalError, ProtocolError) as error:
            self._trouble = str(error)
            rest = [name]
            if isinstance(error, DiskError):
                rest = list(self._short_since)  # nor will another file find room
            elif not isinstance(error, ContentUnavailable):
                _log.warning("copy.failed", cid=file.cid, reason=str(error))
            until = trio.current_time() + REST_SECONDS
            self._rests_until |= dict.fromkeys(rest, until)
            return False
        self._trouble = ""
        self._rests_until[name] = trio.current_time() + REST_SECONDS
        self._store.pin(file.cid, LAST_PIN)  # until the next look knows better
        self._pinned.pop(Standing.LAST, None)
        self._judged = None
        _log.info("copy.made", cid=short(file.cid), size_bytes=file.size)
        return True

    def _report(self, manifest: Manifest) -> None:
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
                count=len(self._copies.short),
                model=manifest.name,
                fewest=self._copies.fewest,
                wanted=self._copies.wanted,
                reason=reason,
            )
        else:
            self._health.clear("few-copies")


def _goes(advert: Advert) -> bool:
    """Whether a node is about to leave and takes its copies with it."""
    return HANDOVER in advert.tags or (advert.serving is not None and advert.serving.state == DRAINING)


def _files_of(head: Head, manifest: Manifest) -> dict[bytes, FileRef]:
    """What serving and asking need: binary CID -> file. The manifest itself is with everybody."""
    return {cid_to_bytes(ref.cid): ref for ref in manifest.files_of(head.variant)}
