"""The newest signed record of everybody: takes, judges and keeps them, and notices what ends by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import trio

from meshnode.core.awake import AwakeClock
from meshnode.core.clock import Wall
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.membership.rights import Rights
from meshnode.services.directory.contest import Contest
from meshnode.services.port import Ranks
from meshnode.state.port import Records
from protocols.advert.messages import ADVERT, HEAD, Advert, Announcement
from protocols.advert.validate import Early
from protocols.advert.view import Body, Entry, Key, Outcome, Version, View, serves
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, short
from protocols.membership.messages import PUBLISH, SERVE
from protocols.notice.messages import ROLE_OF, Notice

REVIEW_S: Final = 5.0  # between looks at every certificate: they expire

_log = get_logger("directory")


class RecordBook:
    """Adverts of everybody, the announcements of publishers, which outlive a restart, and notices."""

    def __init__(self, us: PeerId, members: Ranks, records: Records, health: Health, wall: Wall) -> None:
        self.changes = Changes()
        self.noticed = Changes()  # whenever a notice says something else
        self.clock = AwakeClock()  # of leases: a loop that was held up accuses nobody
        self._us = us
        self._members = members
        self._records = records
        self._health = health
        self._wall = wall
        self._rights = Rights(members.roles_of, health)
        self._view = View(members.roles_of, us)
        self._written: Version = (0, 0)  # of our newest advert
        self._alive: frozenset[PeerId] = frozenset()
        self._leases = Changes()  # one may end earlier than it seemed
        self._early = list(records.records(HEAD).values())  # kept, but dated in the future, as far as we know
        self.contest = Contest()
        self.losses: dict[PeerId, Version] = {}  # of whom others said so, and what its newest advert was
        self.on_loss: Callable[[PeerId], None] = lambda peer: None  # told of everybody whom others have lost
        self._restore()
        self._report()

    def _restore(self) -> bool:
        """Take the kept announcements whose date has come; whether there was one.

        Our own clock may be wrong at the start, so what lies in its future is no reason to forget it.
        """
        early, self._early = self._early, []
        for data in early:
            try:
                self._view.accept(data, 0.0, self._wall())
            except Early:
                self._early.append(data)
            except RemoteProtocolError as error:
                _log.warning("announcement.forgotten", reason=str(error))
        return len(self._early) < len(early)

    # Reading

    def adverts(self) -> dict[PeerId, Entry]:
        """Adverts that hold now, ours included, sorted by peer id."""
        return self._view.alive(ADVERT, self.clock.now())

    def announcements(self) -> dict[PeerId, Announcement]:
        """The newest announcement of every publisher, those taken back too, sorted by publisher."""
        entries = self._view.alive(HEAD, self.clock.now())
        return {peer: entry.body for peer, entry in entries.items() if isinstance(entry.body, Announcement)}

    def announcement(self) -> Announcement | None:
        """The release that the network is told to serve: the first of `ranked`."""
        return next(iter(self.ranked()), None)

    def ranked(self) -> tuple[Announcement, ...]:
        """What publishers say that is not taken back: founders' devices first, then the newest word."""
        held = [one for one in self.announcements().values() if not one.retired]

        def rank(one: Announcement) -> tuple[bool, int, str, str]:
            return not self.is_founder(PeerId(one.peer)), -one.created_ms, one.manifest, one.peer

        return tuple(sorted(held, key=rank))

    def notices(self, kind: str) -> dict[PeerId, bytes]:
        """The newest notice of that kind of everybody who may give one and has not taken it back, sorted by peer."""
        entries = self._view.alive(kind, self.clock.now())
        bodies = {peer: entry.body for peer, entry in entries.items()}
        return {peer: body.content for peer, body in bodies.items() if isinstance(body, Notice) and body.content}

    def is_founder(self, peer: PeerId) -> bool:
        """Whether its word goes before a member's."""
        return self._members.is_founder(peer)

    def get(self, domain: str, signer: PeerId) -> Entry | None:
        """The newest record held, whether it counts or not."""
        return self._view.get(domain, signer)

    def versions(self) -> Mapping[Key, Version]:
        """Everything that was ever seen: nobody needs to send it again."""
        return self._view.versions()

    def shareable(self, reader: PeerId) -> Mapping[Key, tuple[bytes, float]]:
        """Records worth giving to a peer, each with its age in seconds."""
        return self._view.shareable(self.clock.now(), reader)

    # Writing

    def take(self, giver: PeerId, data: bytes, age_s: float = 0.0) -> bool:
        """Take a record that a peer gave us; whether it was news."""
        try:
            outcome, (domain, signer) = self._view.accept(data, self.clock.now(), self._wall(), age_s=age_s)
        except RemoteProtocolError as error:
            if isinstance(error, Early):
                self._health.set("dated-ahead", peer=short(giver))
            _log.warning("record.refused", giver=giver, reason=str(error))
            return False
        if outcome is Outcome.TOO_FAST:
            _log.warning("record.flooded", peer=signer, domain=domain)
            self._health.set("too-fast", peer=signer, what=f"records about itself ({domain})")
            return False
        mine = self._view.get(ADVERT, self._us)
        foreign = signer == self._us and mine is not None and mine.version > self._written
        if foreign and mine is not None and outcome is not Outcome.OLD:
            # One of ours came from outside, newer than the one we wrote: somebody else has our key.
            _log.error("record.contradicted", peer=signer, domain=domain)
            self.contest.begin(mine.version, trio.current_time() - age_s)
        if outcome is Outcome.CONFLICT:
            _log.error("record.contradicted", peer=signer, domain=domain)
            self._health.set("two-writers", peer=signer)
        elif domain == ADVERT and outcome is Outcome.CHANGED:
            self._tell_contest(signer)
        if outcome is Outcome.SUSPECT:
            self._leases.notify()
            self.losses[signer] = self.version_of(signer)
            self.on_loss(signer)
            return signer != self._us
        if outcome in (Outcome.CHANGED, Outcome.STRANGER):
            self._look_at_rights(domain, signer)
        if domain == HEAD and outcome is Outcome.CHANGED:
            self._records.put_record(HEAD, signer, data)
        if outcome in (Outcome.CHANGED, Outcome.CONFLICT):
            if domain in ROLE_OF:
                self.noticed.notify()
            else:
                self._notify()
        return outcome in (Outcome.CHANGED, Outcome.RENEWED)

    def _look_at_rights(self, domain: str, signer: PeerId) -> None:
        """Name a member that says what it may not say; the view leaves it out of account."""
        entry = self._view.get(domain, signer)
        if domain == HEAD:
            self._rights.may(signer, PUBLISH, "says which model the network serves")
        elif domain in ROLE_OF:
            self._rights.may(signer, ROLE_OF[domain], f"gives notice of a {domain}")
        elif entry is not None and isinstance(entry.body, Advert) and serves(entry.body):
            self._rights.may(signer, SERVE, "says that it serves layers")

    def write(self, domain: str, body: Body, payload: bytes, record: bytes) -> None:
        """Take a record that we have signed ourselves. An advert notifies nobody: `advertise` has done so."""
        self._view.write(domain, body, payload, record, self.clock.now())
        match body:
            case Advert():
                self._written = (body.incarnation, body.sequence)
                self._tell_contest(self._us)
            case Announcement():
                self._records.put_record(domain, body.peer, record)
                self._notify()
            case Notice():
                self.noticed.notify()

    def _tell_contest(self, signer: PeerId) -> None:
        """Whether a node and another one with its key contradict each other, by its newest advert."""
        entry = self._view.get(ADVERT, signer)
        if entry is not None and entry.contested:
            self._health.set("two-writers", peer=signer)
        else:
            self._health.clear("two-writers", peer=signer)

    def version_of(self, peer: PeerId) -> Version:
        """Of its newest advert; zeros when there is none."""
        entry = self._view.get(ADVERT, peer)
        return (0, 0) if entry is None else entry.version

    def suspect(self, peer: PeerId) -> None:
        """The peer's last connection to us went away: its advert must be renewed soon."""
        self._view.suspect(peer, self.clock.now())
        self._leases.notify()

    # What ends or begins by itself

    async def watch(self) -> None:
        """Notice who expired, and whose certificate has come or gone, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.clock.run)
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
            with trio.move_on_at(self.clock.real(self._view.next_end(self.clock.now()))):
                await self._leases.wait(version)

    async def _watch_certificates(self) -> None:
        while True:
            version = self._members.changes.version
            came = self._restore()
            if self._view.review(strangers_only=False) or came:
                for peer, entry in self._view.alive(HEAD, self.clock.now()).items():
                    self._records.put_record(HEAD, peer, entry.record)
                self.noticed.notify()
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
