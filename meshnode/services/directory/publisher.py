"""What this node says about itself: changes become few signed records, renewed as long as it runs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import trio

from meshnode.core.clock import Wall
from meshnode.core.errors import Declined
from meshnode.core.log import get_logger
from meshnode.membership.rights import demand
from meshnode.net.port import Host
from meshnode.services.directory.author import Author
from meshnode.services.directory.book import RecordBook
from meshnode.services.directory.contest import ASK_S
from meshnode.services.port import Members
from protocols.advert.leases import lease_ms
from protocols.advert.messages import ADVERT, HEAD, LOSS, RENEWALS, Advert, Announcement, Holding, Loss
from protocols.advert.validate import MAX_AHEAD_MS, MAX_SEQUENCE, check_advert, check_announcement
from protocols.bucket import Bucket
from protocols.codec import encode
from protocols.envelope import MAX_RECORD_BYTES
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import Cid, PeerId, short
from protocols.membership.messages import FORBIDDEN, PUBLISH

COALESCE_S: Final = 0.05  # changes of our advert within this time are published as one
BURST: Final = 3  # adverts that may follow each other at once
RATE_PER_S: Final = 2.0  # adverts per second after a burst
REPEATS: Final = 3  # a new announcement is gossiped with this many adverts; afterwards sync repairs
REPEAT_S: Final = 1.0  # between them: who has just joined may not be gossiped with yet
MAX_INCARNATION: Final = 1 << 62  # of another node that has our key; beyond, there is nothing left to outbid it with
SHUTDOWN_S: Final = 1.0  # the notice that we leave takes this long at most
MAX_ADDRESSES: Final = 16
_ENVELOPE_BYTES: Final = 512  # of a record beside its payload, generously


_log = get_logger("directory")


class Publisher:
    """Our own advert and announcement."""

    def __init__(
        self,
        host: Host,
        topic: str,
        author: Author,
        members: Members,
        book: RecordBook,
        first: Advert,
        wall: Wall,
    ) -> None:
        """`first`: our advert; `sequence` is set here, `addresses` when empty are the host's."""
        self._host = host
        self._topic = topic
        self._author = author
        self._members = members
        self._book = book
        self._wall = wall
        self.advert = replace(first, peer=host.peer_id, sequence=0)
        self._follows_host = not first.addresses  # our addresses are those of the host, once it listens
        self._dirty = trio.Event()
        self._announcement = b""  # our announcement, gossiped with the next `_repeats` adverts
        self._repeats = 0
        self._outbid_at = -math.inf  # when we last outbid another node that has our key

    def advertise(self, advert: Advert) -> None:
        """See services/port.py."""
        if _fixed(advert) != _fixed(self.advert):
            raise LocalProtocolError(
                "peer, incarnation, sequence and contest of an advert are not for the caller to set"
            )
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
        demand(self._members.roles_of(us), PUBLISH, "say which model the network serves")
        if not retired:
            self._check_rank(us)
        now = self._wall()
        incarnation, sequence = self._next_version(us, now)
        equals = [one for one in self._book.ranked() if self._is_founder(one) == self._book.is_founder(us)]
        newest = max((one.created_ms for one in equals), default=0)
        announcement = Announcement(
            peer=us,
            incarnation=incarnation,
            sequence=sequence,
            # Ours is the newest, even if another publisher's clock is ahead; but not so new that nobody believes it.
            created_ms=min(max(now, newest + 1), now + MAX_AHEAD_MS),
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
        self._announcement, self._repeats = self._author.sign(HEAD, payload), REPEATS
        self._book.write(HEAD, announcement, payload, self._announcement)
        self._dirty.set()
        return announcement

    def _check_rank(self, us: PeerId) -> None:
        """Raises Declined when a founder's device has spoken, and we are none: nobody would follow us."""
        first = next(iter(self._book.ranked()), None)
        if first is None or self._book.is_founder(us) or not self._is_founder(first):
            return
        raise Declined(
            FORBIDDEN,
            f"The network serves {first.name} {first.version} by the word of {short(first.peer)}, a founder's "
            "device, which goes before this node's. Choose the model there, or take that word back there "
            "(meshnode model retract).",
        )

    def _is_founder(self, one: Announcement) -> bool:
        return self._book.is_founder(PeerId(one.peer))

    def _next_version(self, us: PeerId, now_ms: int) -> tuple[int, int]:
        """(incarnation, sequence) above those of every announcement of ours that is known."""
        mine = self._book.get(HEAD, us)
        if mine is None or mine.version[0] < now_ms:
            return now_ms, 1
        incarnation, sequence = mine.version
        return (incarnation, sequence + 1) if sequence < MAX_SEQUENCE else (incarnation + 1, 1)

    def renew(self) -> None:
        """Publish within moments, although nothing has changed."""
        self._dirty.set()

    async def tell_loss(self, peer: PeerId) -> None:
        """Tell everybody that our connection to a peer broke: those who have none count on its advert."""
        incarnation, sequence = self._book.version_of(peer)
        loss = Loss(peer=self._host.peer_id, lost=peer, incarnation=incarnation, sequence=sequence)
        await self._host.publish(self._topic, self._author.sign(LOSS, encode(loss)))

    async def leave(self) -> None:
        """Tell everybody that we leave, now. If cancelled: perhaps not everybody knows."""
        self.advertise(replace(self.advert, leaving=True))
        with trio.move_on_after(SHUTDOWN_S):
            await self._publish()

    async def run(self) -> None:
        """Publish changes and renewals until cancelled. The host must listen."""
        async with trio.open_nursery() as nursery:
            if self._follows_host:
                await nursery.start(self._follow_addresses)
            nursery.start_soon(self._follow_contest)
            nursery.start_soon(self._publish_forever)

    async def _follow_contest(self) -> None:
        contest = self._book.contest
        version = contest.changes.version
        while True:
            version = await contest.changes.wait(version)
            await trio.sleep_until(self._outbid_at + ASK_S)  # the other one answers as fast as we do
            self._dirty.set()

    async def _follow_addresses(self, *, task_status: trio.TaskStatus[None]) -> None:
        version = self._host.surroundings.version
        self.advertise(replace(self.advert, addresses=self._host.addresses[:MAX_ADDRESSES]))
        task_status.started()
        while True:
            version = await self._host.surroundings.wait(version)
            self.advertise(replace(self.advert, addresses=self._host.addresses[:MAX_ADDRESSES]))

    async def _publish_forever(self) -> None:
        bucket = Bucket(RATE_PER_S, BURST, trio.current_time())
        while True:
            await trio.sleep(bucket.wait_s(trio.current_time()))
            bucket.take(trio.current_time())
            self._dirty = trio.Event()
            await self._publish()
            now = trio.current_time()
            renew_s = REPEAT_S if self._repeats else self.advert.lease_ms / 1000 / RENEWALS
            with trio.move_on_at(min(now + renew_s, self._book.contest.until if self.advert.contested else math.inf)):
                await self._dirty.wait()
                await trio.sleep(COALESCE_S)

    async def _publish(self) -> None:
        """Our next advert, and an announcement that was made lately."""
        self._settle_contest()
        lease = lease_ms(len(self._book.adverts()))
        self.advert = replace(self.advert, sequence=self.advert.sequence + 1, lease_ms=lease)
        body, payload = _fitting(self.advert)
        record = self._author.sign(ADVERT, payload)
        self._book.write(ADVERT, body, payload, record)
        await self._host.publish(self._topic, record)
        if self._repeats:
            self._repeats -= 1
            await self._host.publish(self._topic, self._announcement)

    def _settle_contest(self) -> None:
        """Outbid another node that has our key, and say that we are contested for as long as it speaks."""
        contest, now, before = self._book.contest, trio.current_time(), self.advert
        highest = contest.highest[0]
        if contest.highest > (before.incarnation, before.sequence) and highest < MAX_INCARNATION:
            self._outbid_at = now
            self.advert = replace(before, incarnation=self._author.incarnate(highest + 1), sequence=0)
        if self.advert.contested != contest.goes_on:
            self.advert = replace(self.advert, contested=contest.goes_on)
            goes_on, incarnation = contest.goes_on, self.advert.incarnation
            _log.warning("contest.changed", goes_on=goes_on, incarnation=incarnation)
        if self.advert != before:
            self._book.changes.notify()


def _fixed(advert: Advert) -> tuple[object, ...]:
    return advert.peer, advert.incarnation, advert.sequence, advert.contested


def _fitting(advert: Advert) -> tuple[Advert, bytes]:
    """The advert with as many holdings as a record takes, and its bytes; of very many files some can't be named."""
    while len(payload := encode(advert)) > MAX_RECORD_BYTES - _ENVELOPE_BYTES:
        largest = max(advert.holdings, key=lambda holding: len(holding.cids))
        halved = Holding(manifest=largest.manifest, cids=largest.cids[: len(largest.cids) // 2])
        advert = replace(advert, holdings=tuple(halved if h is largest else h for h in advert.holdings))
    return advert, payload
