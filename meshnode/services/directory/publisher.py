"""What this node says about itself: changes become few signed records, renewed as long as it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import trio

from meshnode.core.clock import Wall
from meshnode.core.errors import Declined
from meshnode.net.port import Host
from meshnode.services.directory.book import RecordBook
from meshnode.services.port import Members, RecordSigner
from protocols.advert.messages import ADVERT, HEAD, RENEW_MS, Advert, Announcement, Holding
from protocols.advert.validate import check_advert, check_announcement
from protocols.advert.view import PUBLISH
from protocols.codec import encode
from protocols.envelope import MAX_RECORD_BYTES
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import Cid

COALESCE_S: Final = 0.05  # changes of our advert within this time are published as one
BURST: Final = 3  # adverts that may follow each other at once
RATE_PER_S: Final = 2.0  # adverts per second after a burst
REPEATS: Final = 3  # a new announcement is gossiped with this many adverts; afterwards sync repairs
RENEW_S: Final = RENEW_MS / 1000
SHUTDOWN_S: Final = 1.0  # the notice that we leave takes this long at most
MAX_ADDRESSES: Final = 16
_ENVELOPE_BYTES: Final = 512  # of a record beside its payload, generously


@dataclass(slots=True)
class _Bucket:
    """Token bucket: `BURST` at once, then `RATE_PER_S`."""

    level: float
    at: float

    def wait_s(self, now: float) -> float:
        """Seconds until one may be taken."""
        self.level = min(float(BURST), self.level + (now - self.at) * RATE_PER_S)
        self.at = now
        return max(0.0, (1.0 - self.level) / RATE_PER_S)


class Publisher:
    """Our own advert and announcement."""

    def __init__(
        self,
        host: Host,
        topic: str,
        signer: RecordSigner,
        members: Members,
        book: RecordBook,
        first: Advert,
        wall: Wall,
    ) -> None:
        """`first`: our advert; `sequence` is set here, `addresses` when empty are the host's."""
        self._host = host
        self._topic = topic
        self._signer = signer
        self._members = members
        self._book = book
        self._wall = wall
        self.advert = replace(first, peer=host.peer_id, sequence=0)
        self._follows_host = not first.addresses  # our addresses are those of the host, once it listens
        self._dirty = trio.Event()
        self._announcement = b""  # our announcement, gossiped with the next `_repeats` adverts
        self._repeats = 0

    def advertise(self, advert: Advert) -> None:
        """See services/port.py."""
        if _fixed(advert) != _fixed(self.advert):
            raise LocalProtocolError("peer, incarnation, sequence and date of an advert are not the caller's to set")
        if advert == self.advert:
            return
        try:
            check_advert(advert, self._host.peer_id)
        except RemoteProtocolError as error:
            raise LocalProtocolError(str(error)) from None
        encode(advert)  # raises for what the message can't hold
        self.advert = advert
        self._dirty.set()
        self._book.changes.notify()

    def announce(self, *, name: str, version: str, manifest: Cid, variant: str, retired: bool) -> Announcement:
        """See `DirectoryService.announce`."""
        us = self._host.peer_id
        if PUBLISH not in self._members.roles_of(us):
            raise Declined("forbidden", "This node may not publish models: its certificate lacks the role publish.")
        mine, start = self._book.get(HEAD, us), (self.advert.incarnation, 0)
        incarnation, sequence = start if mine is None else max(mine.version, start)
        newest = max((one.created_ms for one in self._book.announcements().values()), default=0)
        announcement = Announcement(
            peer=us,
            incarnation=incarnation,
            sequence=sequence + 1,
            created_ms=max(self._wall(), newest + 1),  # ours is the newest, even if a publisher's clock is ahead
            name=name,
            version=version,
            manifest=manifest,
            variant=variant,
            retired=retired,
        )
        try:
            check_announcement(announcement, us)
        except RemoteProtocolError as error:
            raise LocalProtocolError(str(error)) from None
        payload = encode(announcement)
        self._announcement, self._repeats = self._signer.sign(HEAD, payload), REPEATS
        self._book.write(HEAD, announcement, payload, self._announcement)
        self._dirty.set()
        return announcement

    def renew(self) -> None:
        """Publish within moments, although nothing has changed."""
        self._dirty.set()

    async def leave(self) -> None:
        """Tell everybody that we leave, now. If cancelled: perhaps not everybody knows."""
        self.advertise(replace(self.advert, leaving=True))
        with trio.move_on_after(SHUTDOWN_S):
            await self._publish()

    async def run(self) -> None:
        """Publish changes and renewals until cancelled. The host must listen."""
        if self._follows_host:
            self.advertise(replace(self.advert, addresses=self._host.addresses[:MAX_ADDRESSES]))
        bucket = _Bucket(float(BURST), trio.current_time())
        while True:
            await trio.sleep(bucket.wait_s(trio.current_time()))
            bucket.level -= 1.0
            self._dirty = trio.Event()
            await self._publish()
            with trio.move_on_after(RENEW_S):
                await self._dirty.wait()
                await trio.sleep(COALESCE_S)

    async def _publish(self) -> None:
        """Our next advert, and an announcement that was made lately."""
        self.advert = replace(self.advert, sequence=self.advert.sequence + 1)
        body, payload = _fitting(self.advert)
        record = self._signer.sign(ADVERT, payload)
        self._book.write(ADVERT, body, payload, record)
        await self._host.publish(self._topic, record)
        if self._repeats:
            self._repeats -= 1
            await self._host.publish(self._topic, self._announcement)


def _fixed(advert: Advert) -> tuple[object, ...]:
    return advert.peer, advert.incarnation, advert.sequence


def _fitting(advert: Advert) -> tuple[Advert, bytes]:
    """The advert with as many holdings as a record takes, and its bytes; of very many files some can't be named."""
    while len(payload := encode(advert)) > MAX_RECORD_BYTES - _ENVELOPE_BYTES:
        largest = max(advert.holdings, key=lambda holding: len(holding.cids))
        halved = Holding(manifest=largest.manifest, cids=largest.cids[: len(largest.cids) // 2])
        advert = replace(advert, holdings=tuple(halved if h is largest else h for h in advert.holdings))
    return advert, payload
