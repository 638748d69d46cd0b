"""The newest signed record of everybody: takes, judges and keeps them, and notices what ends by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import trio

from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.services.port import Members
from meshnode.state.port import Records
from protocols.advert.messages import ADVERT, HEAD, Advert, Announcement
from protocols.advert.view import Entry, Key, Outcome, Version, View
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId

REVIEW_S: Final = 5.0  # between looks at every certificate: they expire

_log = get_logger("directory")


class RecordBook:
    """Adverts of everybody, and the announcements of publishers; these outlive a restart."""

    def __init__(self, us: PeerId, members: Members, records: Records, health: Health) -> None:
        self.changes = Changes()
        self._us = us
        self._members = members
        self._records = records
        self._health = health
        self._view = View(members.roles_of)
        self._written: Version = (0, 0)  # of our newest advert
        self._alive: frozenset[PeerId] = frozenset()
        self._leases = Changes()  # one may end earlier than it seemed
        for data in records.records(HEAD).values():
            try:
                self._view.accept(data, 0.0)
            except RemoteProtocolError as error:
                _log.warning("announcement.forgotten", reason=str(error))
        self._report()

    # Reading

    def adverts(self) -> dict[PeerId, Entry]:
        """Adverts that hold now, ours included, sorted by peer id."""
        return self._view.alive(ADVERT, trio.current_time())

    def announcements(self) -> dict[PeerId, Announcement]:
        """The newest announcement of every publisher, those taken back too, sorted by publisher."""
        entries = self._view.alive(HEAD, trio.current_time())
        return {peer: entry.body for peer, entry in entries.items() if isinstance(entry.body, Announcement)}

    def announcement(self) -> Announcement | None:
        """The release that the network serves: the newest announcement that is not taken back."""
        held = [one for one in self.announcements().values() if not one.retired]
        return min(held, key=lambda one: (-one.created_ms, one.manifest, one.peer), default=None)

    def get(self, domain: str, signer: PeerId) -> Entry | None:
        """The newest record held, whether it counts or not."""
        return self._view.get(domain, signer)

    def versions(self) -> Mapping[Key, Version]:
        """Everything that was ever seen: nobody needs to send it again."""
        return self._view.versions()

    def shareable(self) -> Mapping[Key, tuple[bytes, float]]:
        """Records worth giving to others, each with its age in seconds."""
        return self._view.shareable(trio.current_time())

    # Writing

    def take(self, giver: PeerId, data: bytes, age_s: float = 0.0) -> bool:
        """Take a record that a peer gave us; whether it was news."""
        try:
            outcome, (domain, signer) = self._view.accept(data, trio.current_time(), age_s=age_s)
        except RemoteProtocolError as error:
            _log.warning("record.refused", giver=giver, reason=str(error))
            return False
        mine = self._view.get(ADVERT, self._us)
        foreign = signer == self._us and mine is not None and mine.version > self._written
        if outcome is Outcome.CONFLICT or (foreign and outcome is not Outcome.OLD):
            # One of ours came from outside, newer than the one we wrote: somebody else has our key.
            _log.error("record.contradicted", peer=signer, domain=domain)
            self._health.set("two-writers", peer=signer)
        if domain == HEAD and outcome is Outcome.CHANGED:
            self._records.put_record(HEAD, signer, data)
        if outcome in (Outcome.CHANGED, Outcome.CONFLICT):
            self._notify()
        return outcome in (Outcome.CHANGED, Outcome.RENEWED)

    def write(self, domain: str, body: Advert | Announcement, payload: bytes, record: bytes) -> None:
        """Take a record that we have signed ourselves. An advert notifies nobody: `advertise` has done so."""
        self._view.write(domain, body, payload, record, trio.current_time())
        if isinstance(body, Advert):
            self._written = (body.incarnation, body.sequence)
        else:
            self._records.put_record(domain, body.peer, record)
            self._notify()

    def suspect(self, peer: PeerId) -> None:
        """The peer's last connection to us went away: its advert must be renewed soon."""
        self._view.suspect(peer, trio.current_time())
        self._leases.notify()

    # What ends or begins by itself

    async def watch(self) -> None:
        """Notice who expired, and whose certificate has come or gone, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_leases)
            nursery.start_soon(self._watch_certificates)

    async def _watch_leases(self) -> None:
        while True:
            version = self._leases.version
            expired = self._alive - self.adverts().keys()
            for peer in sorted(expired):
                _log.info("peer.expired", peer=peer)
            if expired:
                self._notify()
                continue
            with trio.move_on_at(self._view.next_end(trio.current_time())):
                await self._leases.wait(version)

    async def _watch_certificates(self) -> None:
        while True:
            version = self._members.changes.version
            if self._view.review(strangers_only=False):
                for peer, entry in self._view.alive(HEAD, trio.current_time()).items():
                    self._records.put_record(HEAD, peer, entry.record)
                self._notify()
            with trio.move_on_after(REVIEW_S):
                await self._members.changes.wait(version)

    def _notify(self) -> None:
        self._alive = frozenset(self.adverts())
        self._report()
        self._leases.notify()
        self.changes.notify()

    def _report(self) -> None:
        if self.announcement() is None:
            self._health.set("no-model")
        else:
            self._health.clear("no-model")
