"""Who offers what, right now: everybody's newest advert and announcement, and ours.

Records come by gossip (`book.py` judges them) and, for whatever gossip lost, by anti-entropy over a direct stream
(`sync.py`); ours go out by gossip (`publisher.py`). See protocols/advert and protocols/sync.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

import trio

from meshnode.core.clock import Wall
from meshnode.core.health import Health
from meshnode.core.signal import Changes
from meshnode.net.port import Host
from meshnode.services.directory.book import RecordBook
from meshnode.services.directory.publisher import Publisher
from meshnode.services.directory.sync import Sync
from meshnode.services.port import Members, RecordSigner
from meshnode.state.port import Records
from protocols.advert.messages import ADVERT, Advert, Announcement
from protocols.ids import Cid, PeerId, cid_to_bytes

INCARNATION: Final = "incarnation"  # kind of record


def next_incarnation(records: Records, us: PeerId, now_ms: int) -> int:
    """The incarnation of this start of the node: its wall clock, but always above the one before.

    A clock that was set back would otherwise make everybody ignore us: they hold a newer advert of ours.
    """
    before = int.from_bytes(records.record(INCARNATION, us) or b"", "big")
    now = max(now_ms, before + 1)
    records.put_record(INCARNATION, us, now.to_bytes(8, "big"))
    return now


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectorySettings:
    topic: str  # of the gossip
    first: Advert  # ours; its sequence and date are set by the directory, and empty addresses are the host's
    rng: random.Random  # whom to ask, and when


class DirectoryService:
    """`Directory` of services/port.py."""

    name = "directory"

    def __init__(
        self,
        host: Host,
        signer: RecordSigner,
        members: Members,
        records: Records,
        health: Health,
        wall: Wall,
        settings: DirectorySettings,
    ) -> None:
        """Registers the topic and the protocol: make it before `host.run`."""
        self._host = host
        self._us = host.peer_id
        self._book = RecordBook(self._us, members, records, health)
        self._publisher = Publisher(host, settings.topic, signer, members, self._book, settings.first, wall)
        self._sync = Sync(host, self._book, settings.rng)
        host.subscribe(settings.topic, self._book.take)

    # What others read

    @property
    def changes(self) -> Changes:
        """Whenever a live advert says something else, somebody appears or vanishes, or an announcement changes."""
        return self._book.changes

    def live(self) -> dict[PeerId, Advert]:
        """Adverts that hold now, ours included (unless we are leaving), sorted by peer id."""
        adverts = {
            peer: entry.body
            for peer, entry in self._book.adverts().items()
            if isinstance(entry.body, Advert) and peer != self._us
        }
        if not self.me().leaving:
            adverts[self._us] = self.me()
        return dict(sorted(adverts.items()))

    def me(self) -> Advert:
        """Our own advert, with changes that are not published yet."""
        return self._publisher.advert

    def announcements(self) -> dict[PeerId, Announcement]:
        """The newest announcement of every publisher, those taken back too, sorted by publisher."""
        return self._book.announcements()

    def announcement(self) -> Announcement | None:
        """The release that the network serves: the newest announcement that is not taken back."""
        return self._book.announcement()

    def providers(self, cid: Cid) -> list[PeerId]:
        """Peers that have a file or block, never ourselves: connected first, then by round trip."""
        wanted = cid_to_bytes(cid)
        holders = [peer for peer, entry in self._book.adverts().items() if wanted in entry.cids]
        connected = frozenset(self._host.peers)

        def rank(peer: PeerId) -> tuple[bool, float, PeerId]:
            trip = self._host.round_trip_us(peer) if peer in connected else None
            return peer not in connected, math.inf if trip is None else trip, peer

        return sorted((peer for peer in holders if peer != self._us), key=rank)

    def age_s(self, peer: PeerId) -> float | None:
        """Seconds since the peer's advert last changed its sequence number; 0 for us, None if never heard of."""
        if peer == self._us:
            return 0.0
        entry = self._book.get(ADVERT, peer)
        return None if entry is None else max(0.0, trio.current_time() - entry.since)

    # What we say

    def advertise(self, advert: Advert) -> None:
        """Publish `dataclasses.replace(directory.me(), ...)`: within moments, a few times per second at most.

        Raises LocalProtocolError for a value that others would refuse; nothing is changed then.
        """
        self._publisher.advertise(advert)

    def announce(
        self, *, name: str, version: str, manifest: Cid, variant: str, retired: bool = False
    ) -> Announcement:
        """Say that the network serves this release from now on (or no longer). Replaces what we said before.

        Raises Declined `forbidden` without the role "publish", LocalProtocolError for a value that others
        would refuse.
        """
        return self._publisher.announce(
            name=name, version=version, manifest=manifest, variant=variant, retired=retired
        )

    async def goodbye(self) -> None:
        """Tell everybody that we leave, now. If cancelled: perhaps not everybody knows."""
        await self._publisher.leave()

    # The service

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Publish, listen and repair until cancelled. Start it when the host listens."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._publisher.run)
            nursery.start_soon(self._sync.run)
            nursery.start_soon(self._book.watch)
            events = self._host.events()
            task_status.started()
            async for event in events:
                if not event.connected:
                    self._book.suspect(event.peer)
                    self._publisher.renew()  # it suspects us, too: others pass on that we are there
