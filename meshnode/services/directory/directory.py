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
from meshnode.services.directory.author import Author
from meshnode.services.directory.book import RecordBook
from meshnode.services.directory.notices import NoticesService
from meshnode.services.directory.publisher import Publisher
from meshnode.services.directory.sync import Sync
from meshnode.services.port import Ranks, RecordSigner
from meshnode.state.port import Records
from protocols.advert.messages import ADVERT, Advert, Announcement
from protocols.advert.view import within
from protocols.ids import Cid, PeerId, cid_to_bytes

TELL_S: Final = (0.05, 1.0)  # from the loss of a connection until others are told


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
        members: Ranks,
        records: Records,
        health: Health,
        wall: Wall,
        settings: DirectorySettings,
    ) -> None:
        """Registers the topic and the protocol: make it before `host.run`."""
        self._host = host
        self._us = host.peer_id
        self._members = members
        self._book = RecordBook(self._us, members, records, health, wall)
        self._publisher = Publisher(
            host,
            settings.topic,
            Author(self._us, signer, records, wall),
            members,
            self._book,
            settings.first,
            wall,
        )
        self.notices = NoticesService(host, settings.topic, signer, members, self._book, records, wall)
        self._book.on_loss = self._lost_elsewhere
        self._rng = settings.rng
        self._sync = Sync(host, settings.topic, self._book, settings.rng)
        host.subscribe(settings.topic, self._book.take)

    # What others read

    @property
    def changes(self) -> Changes:
        """Whenever a live advert says something else, somebody appears or vanishes, or an announcement changes."""
        return self._book.changes

    def live(self) -> dict[PeerId, Advert]:
        """What counts of the adverts that hold now, ours included (unless we are leaving), sorted by peer id."""
        adverts = {
            peer: entry.counts
            for peer, entry in self._book.adverts().items()
            if isinstance(entry.counts, Advert) and peer != self._us
        }
        if not self.me().leaving:
            adverts[self._us] = within(self.me(), self._members.roles_of(self._us))
        return dict(sorted(adverts.items()))

    def me(self) -> Advert:
        """Our own advert, with changes that are not published yet."""
        return self._publisher.advert

    def announcements(self) -> dict[PeerId, Announcement]:
        """The newest announcement of every publisher, those taken back too, sorted by publisher."""
        return self._book.announcements()

    def announcement(self) -> Announcement | None:
        """The release that the network is told to serve: the first of `ranked`."""
        return self._book.announcement()

    def ranked(self) -> tuple[Announcement, ...]:
        """Words of publishers that are not taken back: those of founders' devices first, then the newest."""
        return self._book.ranked()

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
        return None if entry is None else max(0.0, self._book.clock.now() - entry.since)

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

        Raises Declined `forbidden` without the role "publish", or while the word of a founder's device goes
        before ours; LocalProtocolError for a value that others would refuse.
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
            nursery.start_soon(self.notices.run)
            events = self._host.events()
            task_status.started()
            async for event in events:
                if not event.connected:
                    self._book.suspect(event.peer)
                    self._publisher.renew()  # it suspects us, too: others pass on that we are there
                    nursery.start_soon(self._tell_loss, event.peer)

    async def _tell_loss(self, peer: PeerId) -> None:
        """Unless it is back, says anything, or somebody else has said so: many lose it in the same moment."""
        version = self._book.version_of(peer)
        await trio.sleep(self._rng.uniform(*TELL_S))
        gone = peer not in self._host.peers and self._book.version_of(peer) == version
        if gone and self._host.peers and peer in self._book.adverts() and self._book.losses.get(peer) != version:
            await self._publisher.tell_loss(peer)

    def _lost_elsewhere(self, peer: PeerId) -> None:
        """Somebody else's connection to a peer broke."""
        if peer == self._us:
            self._publisher.renew()
        else:
            self._host.doubt(peer)
