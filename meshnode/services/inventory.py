"""Tells the others what this node has on disk, and how much more it could take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import trio

from meshnode.core.signal import Changes
from meshnode.services.port import Directory
from meshnode.store.port import Content
from protocols.advert.messages import Announcement, Holding
from protocols.ids import Cid, cid_to_bytes
from protocols.manifest.messages import Manifest

LOOK_SECONDS: Final = 0.5  # between looks at the store
MAX_FILES: Final = 1024  # of one manifest that an advert can name (protocols/advert)
MAX_NAMES: Final = 1280  # of all: they fill most of a signed record
MAX_MANIFESTS: Final = 16
ROOM_CHANGE: Final = 0.1  # room is advertised again when it changed by this share of itself


class InventoryService:
    """Owns `holdings` and `disk_free_bytes` of our advert."""

    name = "inventory"

    def __init__(self, directory: Directory, store: Content, open_manifest: Callable[[bytes], Manifest]) -> None:
        self._directory = directory
        self._store = store
        self._open_manifest = open_manifest
        self._releases: dict[Cid, dict[Cid, bytes]] = {}
        self._served: tuple[str, str, frozenset[bytes]] = ("", "", frozenset())
        self._seen: tuple[object, tuple[Holding, ...]] = (None, ())
        self.changes = Changes()  # of what `holdings` says

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the advert right until cancelled."""
        self._look()
        task_status.started()
        while True:
            await trio.sleep(LOOK_SECONDS)
            self._look()

    def _look(self) -> None:
        me = self._directory.me()
        room = self._store.usage().room_bytes
        if abs(room - me.disk_free_bytes) > ROOM_CHANGE * me.disk_free_bytes:
            me = replace(me, disk_free_bytes=room)
        self._directory.advertise(replace(me, holdings=self._sayable(self.holdings())))

    def holdings(self) -> tuple[Holding, ...]:
        """What we hold of every release that a head names, and whose manifest is here."""
        files = self._store.files()
        manifests = sorted({head.manifest for head in self._directory.announcements().values()})
        if self._seen[0] != (files, manifests):
            out: list[Holding] = []
            for manifest in manifests:
                wanted = self._files_of(Cid(manifest))
                held = tuple(sorted(data for cid, data in wanted.items() if cid in files))
                if held:
                    out.append(Holding(manifest=manifest, cids=held))
            changed = tuple(out) != self._seen[1]
            self._seen = ((files, manifests), tuple(out))
            if changed:
                self.changes.notify()
        return self._seen[1]

    def _sayable(self, holdings: tuple[Holding, ...]) -> tuple[Holding, ...]:
        """As much of it as an advert carries: what is served first, for copies of that are counted by everybody."""
        names = [len(holding.cids) for holding in holdings]
        if sum(names) <= MAX_NAMES and max(names, default=0) <= MAX_FILES and len(names) <= MAX_MANIFESTS:
            return holdings
        head = self._directory.announcement()
        served = "" if head is None else head.manifest
        needed = frozenset[bytes]() if head is None else self._needed(head)
        out: list[Holding] = []
        left = MAX_NAMES
        for holding in sorted(holdings, key=lambda holding: holding.manifest != served)[:MAX_MANIFESTS]:
            first = sorted(holding.cids, key=lambda cid: cid not in needed)[: min(left, MAX_FILES)]
            left -= len(first)
            if first:
                out.append(Holding(manifest=holding.manifest, cids=tuple(sorted(first))))
        return tuple(sorted(out, key=lambda holding: holding.manifest))

    def _needed(self, head: Announcement) -> frozenset[bytes]:
        """Files of the served variant, as far as its manifest is here."""
        if self._served[:2] != (head.manifest, head.variant):
            block = self._store.block(Cid(head.manifest))
            manifest = None if block is None else self._open_manifest(block)
            if manifest is None or head.variant not in manifest.variants:
                return frozenset()
            needed = frozenset(cid_to_bytes(ref.cid) for ref in manifest.files_of(head.variant))
            self._served = (head.manifest, head.variant, needed)
        return self._served[2]

    def _files_of(self, cid: Cid) -> Mapping[Cid, bytes]:
        """Every file of a release, and its manifest, with their CIDs in bytes; read once."""
        known = self._releases.get(cid)
        if known is None:
            block = self._store.block(cid)
            if block is None:
                return {}
            files = (cid, *self._open_manifest(block).all_files())
            known = self._releases[cid] = {file: cid_to_bytes(file) for file in files}
        return known
