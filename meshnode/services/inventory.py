"""Tells the others what this node has on disk, and how much more it could take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import trio

from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.core.sizes import format_size
from meshnode.services.port import Directory
from meshnode.store.port import Content, StoreUsage
from protocols.advert.messages import Holding
from protocols.errors import RemoteProtocolError
from protocols.ids import Cid, cid_to_bytes
from protocols.manifest.codec import open_manifest
from protocols.manifest.messages import Manifest

LOOK_S: Final = 1.0  # between questions whether the store has changed: other processes change it, too
ROOM_S: Final = 10.0  # between looks at the disk, which everybody fills
MAX_FILES: Final = 1024  # of one manifest that an advert can name (protocols/advert)
MAX_NAMES: Final = 1280  # of all: they fill most of a signed record
MAX_MANIFESTS: Final = 16
ROOM_CHANGE: Final = 0.1  # room is advertised again when it changed by this share of itself
LOW_DISK_BYTES: Final = 256 << 20  # less room on the disk is worth a word

_log = get_logger("inventory")


class InventoryService:
    """Owns `holdings` and `disk_free_bytes` of our advert, and what health says of the disk."""

    name = "inventory"

    def __init__(self, directory: Directory, store: Content, health: Health) -> None:
        self._directory = directory
        self._store = store
        self._health = health
        self._releases: dict[Cid, dict[Cid, bytes]] = {}
        self._current: tuple[Cid, str] | None = None  # served now, announced or not
        self._served: tuple[str, str, frozenset[bytes]] = ("", "", frozenset())
        self._seen: object = None  # what `_holdings` was made of
        self._holdings: tuple[Holding, ...] = ()
        self.changes = Changes()  # of `holdings`

    def holdings(self) -> tuple[Holding, ...]:
        """What we hold of every release that is announced or served, if its manifest is here. A second old."""
        return self._holdings

    def serve(self, release: tuple[Cid, str] | None) -> None:
        """This release (manifest, variant) is served from now on, whatever is announced."""
        self._current = release

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the advert right until cancelled."""
        self.look()
        task_status.started()
        seen: object = None
        looked_at = -math.inf
        while True:
            version = self._directory.changes.version
            now = (self._store.version(), self._announced(), self._current)
            if now != seen or trio.current_time() - looked_at >= ROOM_S:
                seen, looked_at = now, trio.current_time()
                self.look()
            with trio.move_on_after(LOOK_S):
                await self._directory.changes.wait(version)

    def look(self) -> None:
        """Count what was stored a moment ago, too."""
        files, manifests = self._store.files(), self._announced()
        if self._seen != (files, manifests):
            self._seen = (files, manifests)
            out: list[Holding] = []
            for manifest in manifests:
                wanted = self._files_of(Cid(manifest))
                held = tuple(sorted(data for cid, data in wanted.items() if cid in files))
                if held:
                    out.append(Holding(manifest=manifest, cids=held))
            if tuple(out) != self._holdings:
                self._holdings = tuple(out)
                self.changes.notify()
        me = self._directory.me()
        usage = self._store.usage()
        room = usage.room_bytes
        if abs(room - me.disk_free_bytes) > ROOM_CHANGE * me.disk_free_bytes:
            me = replace(me, disk_free_bytes=room)
        self._directory.advertise(replace(me, holdings=self._sayable(self._holdings)))
        self._watch_room(usage)

    def _announced(self) -> list[str]:
        served = () if self._current is None else (self._current[0],)
        return sorted({*served, *(head.manifest for head in self._directory.announcements().values())})

    def _watch_room(self, usage: StoreUsage) -> None:
        """The quota was lowered, or its share of the disk shrank, below what may not go; or the disk is full."""
        if usage.used_bytes > usage.quota_bytes:
            held, quota = format_size(usage.used_bytes), format_size(usage.quota_bytes)
            self._health.set("quota-exceeded", held=held, quota=quota)
        else:
            self._health.clear("quota-exceeded")
        if usage.free_disk_bytes < LOW_DISK_BYTES:
            self._health.set("disk-low", free=format_size(usage.free_disk_bytes))
        else:
            self._health.clear("disk-low")

    def _sayable(self, holdings: tuple[Holding, ...]) -> tuple[Holding, ...]:
        """As much of it as an advert carries: what is served first, for copies of that are counted by everybody."""
        names = [len(holding.cids) for holding in holdings]
        if sum(names) <= MAX_NAMES and max(names, default=0) <= MAX_FILES and len(names) <= MAX_MANIFESTS:
            return holdings
        served = "" if self._current is None else self._current[0]
        needed = frozenset[bytes]() if self._current is None else self._needed(*self._current)
        out: list[Holding] = []
        left = MAX_NAMES
        for holding in sorted(holdings, key=lambda holding: holding.manifest != served)[:MAX_MANIFESTS]:
            first = sorted(holding.cids, key=lambda cid: cid not in needed)[: min(left, MAX_FILES)]
            left -= len(first)
            if first:
                out.append(Holding(manifest=holding.manifest, cids=tuple(sorted(first))))
        return tuple(sorted(out, key=lambda holding: holding.manifest))

    def _needed(self, cid: Cid, variant: str) -> frozenset[bytes]:
        """Files of the served variant, as far as its manifest is here."""
        if self._served[:2] != (cid, variant):
            manifest = self._manifest(cid)
            if manifest is None or variant not in manifest.variants:
                return frozenset()
            needed = frozenset(cid_to_bytes(ref.cid) for ref in manifest.files_of(variant))
            self._served = (cid, variant, needed)
        return self._served[2]

    def _files_of(self, cid: Cid) -> Mapping[Cid, bytes]:
        """Every file of a release, and its manifest, with their CIDs in bytes; read once."""
        known = self._releases.get(cid)
        if known is None:
            manifest = self._manifest(cid)
            if manifest is None:
                return {}
            known = self._releases[cid] = {file: cid_to_bytes(file) for file in (cid, *manifest.all_files())}
        return known

    def _manifest(self, cid: Cid) -> Manifest | None:
        """None while it is not here, or when it is none: whoever announces it may announce anything."""
        block = self._store.block(cid)
        try:
            return None if block is None else open_manifest(block)
        except RemoteProtocolError as error:
            _log.debug("manifest.refused", manifest=cid, reason=str(error))
            return None
