"""What is known of everybody: the newest record of each (domain, signer). SPEC.md, section Behaviour.

A state-based CRDT: whatever the order in which records come, and however often, the same set gives the same
view. Time comes in as `now` (monotonic seconds), what the certificates say as a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from protocols.advert.leases import age_of, end_of, end_of_suspect
from protocols.advert.messages import ADVERT, HEAD, Advert, Announcement
from protocols.advert.validate import check_advert, check_announcement
from protocols.codec import decode
from protocols.envelope import Opened, open_record
from protocols.ids import PeerId

MAX_ENTRIES: Final = 4096  # twice what the largest network (1024 members) needs
MAX_STRANGERS: Final = 256  # records of signers whose certificates have not come yet
PUBLISH: Final = "publish"  # the role that an announcement needs

Key = tuple[str, PeerId]  # domain, signer
Version = tuple[int, int]  # incarnation, sequence


class Outcome(Enum):
    """What became of a record."""

    CHANGED = "changed"  # newer, and says something else
    RENEWED = "renewed"  # newer, and says the same
    KNOWN = "known"  # held already
    OLD = "old"  # a newer one is held
    STRANGER = "stranger"  # kept, but without effect until the signer's certificate allows it
    IGNORED = "ignored"  # of an unknown domain, of a signer caught with two records, expired, or no room
    CONFLICT = "conflict"  # the same version as the one held, but other content: two writers


@dataclass(slots=True)
class Entry:
    """The newest record of one signer in one domain."""

    version: Version
    body: Advert | Announcement
    payload: bytes
    record: bytes  # as received, to be passed on
    since: float  # when its version was new, by our clock (earlier, if it was old when it reached us)
    until: float  # end of its lease; infinite for an announcement
    cids: frozenset[bytes]  # all holdings of an advert
    roles: frozenset[str]  # of the signer's certificate, when last looked

    @property
    def leaving(self) -> bool:
        return isinstance(self.body, Advert) and self.body.leaving

    @property
    def allowed(self) -> bool:
        """Whether the signer may say this: any member an advert, a publisher an announcement."""
        return bool(self.roles) if isinstance(self.body, Advert) else PUBLISH in self.roles


def _read_advert(opened: Opened) -> Advert:
    advert = decode(Advert, opened.payload)
    check_advert(advert, opened.signer)
    return advert


def _read_announcement(opened: Opened) -> Announcement:
    announcement = decode(Announcement, opened.payload)
    check_announcement(announcement, opened.signer)
    return announcement


_READERS: Final[Mapping[str, Callable[[Opened], Advert | Announcement]]] = {
    ADVERT: _read_advert,
    HEAD: _read_announcement,
}


def _said(body: Advert | Announcement) -> Advert | Announcement:
    """The content of a record without what every renewal changes."""
    return replace(body, sequence=0)


class View:
    """The newest record of everybody."""

    def __init__(self, roles_of: Callable[[PeerId], frozenset[str] | None]) -> None:
        """`roles_of`: roles of a member's certificate; None or empty for who is not known as a member."""
        self._roles_of = roles_of
        self._entries: dict[Key, Entry] = {}
        self._conflicts: dict[Key, int] = {}  # incarnation in which a signer wrote two records of one version

    def accept(self, data: bytes, now: float, *, age_s: float = 0.0) -> tuple[Outcome, Key]:
        """Take a record that came from anywhere.

        Args:
          age_s: how long ago the giver saw it first; shortens its lease here.

        Raises:
          RemoteProtocolError: damaged, forged, or with content that nobody can use.
        """
        opened = open_record(data)
        key = (opened.domain, opened.signer)
        read = _READERS.get(opened.domain)
        if read is None:
            return Outcome.IGNORED, key
        body = read(opened)
        version = (body.incarnation, body.sequence)
        if version[0] <= self._conflicts.get(key, -1):
            return Outcome.IGNORED, key
        known = self._entries.get(key)
        if known is not None and version <= known.version:
            if version < known.version:
                return Outcome.OLD, key
            if known.payload == opened.payload:
                return Outcome.KNOWN, key
            self._conflicts[key] = version[0]
            return Outcome.CONFLICT, key
        entry = self._entry(key, body, opened.payload, data, now - age_s)
        if entry.until <= now or (known is None and not self._make_room(now, stranger=not entry.allowed)):
            return Outcome.IGNORED, key
        self._entries[key] = entry
        if not entry.allowed:
            return Outcome.STRANGER, key
        same = known is not None and known.until > now and _said(known.body) == _said(body)
        return Outcome.RENEWED if same else Outcome.CHANGED, key

    def write(self, domain: str, body: Advert | Announcement, payload: bytes, record: bytes, now: float) -> None:
        """Take a record that we have signed ourselves: it is not verified. Never above a newer one under our name."""
        key = (domain, PeerId(body.peer))
        known = self._entries.get(key)
        if known is None or known.version < (body.incarnation, body.sequence):
            self._entries[key] = self._entry(key, body, payload, record, now)

    def _entry(self, key: Key, body: Advert | Announcement, payload: bytes, record: bytes, since: float) -> Entry:
        known = self._entries.get(key)
        return Entry(
            version=(body.incarnation, body.sequence),
            body=body,
            payload=payload,
            record=record,
            since=since,
            until=end_of(key[0], since),
            cids=frozenset(cid for h in body.holdings for cid in h.cids) if isinstance(body, Advert) else frozenset(),
            roles=known.roles if known is not None and known.allowed else self._roles_of(key[1]) or frozenset(),
        )

    def _make_room(self, now: float, *, stranger: bool) -> bool:
        if stranger:
            strangers = [key for key, entry in self._entries.items() if not entry.allowed]
            if len(strangers) >= MAX_STRANGERS:
                del self._entries[min(strangers, key=lambda key: (self._entries[key].since, key))]
        if len(self._entries) < MAX_ENTRIES:
            return True
        dead = [key for key, entry in self._entries.items() if entry.until <= now]
        if dead:
            del self._entries[min(dead, key=lambda key: (self._entries[key].until, key))]
        return bool(dead)

    def review(self, *, strangers_only: bool) -> bool:
        """Look at the certificates again; whether anybody's standing changed."""
        changed = False
        for key, entry in self._entries.items():
            if not (strangers_only and entry.allowed):
                before = entry.allowed
                entry.roles = self._roles_of(key[1]) or frozenset()
                changed |= entry.allowed != before
        return changed

    def get(self, domain: str, signer: PeerId) -> Entry | None:
        """The newest record held, alive or not."""
        return self._entries.get((domain, signer))

    def suspect(self, peer: PeerId, now: float) -> None:
        """The peer's last connection to us went away: its advert must be renewed within `SUSPECT_S`."""
        entry = self._entries.get((ADVERT, peer))
        if entry is not None:
            entry.until = end_of_suspect(entry.until, now)

    def alive(self, domain: str, now: float) -> dict[PeerId, Entry]:
        """Records of a domain that hold now: allowed, lease running, not leaving, one writer. Sorted by signer."""
        return {
            key[1]: entry
            for key, entry in sorted(self._entries.items(), key=lambda item: item[0])
            if key[0] == domain
            and entry.until > now
            and entry.allowed
            and not entry.leaving
            and entry.version[0] > self._conflicts.get(key, -1)
        }

    def next_end(self, now: float) -> float:
        """When the next lease of an advert ends that counts now; infinite when there is none."""
        return min((entry.until for entry in self.alive(ADVERT, now).values()), default=float("inf"))

    def versions(self) -> dict[Key, Version]:
        """Everything that was ever seen, dead records too: nobody needs to send it again."""
        return {key: entry.version for key, entry in self._entries.items()}

    def shareable(self, now: float) -> dict[Key, tuple[bytes, float]]:
        """Records worth giving to others, each with its age in seconds: of members, lease running."""
        return {
            key: (entry.record, age_of(key[0], entry.since, now))
            for key, entry in self._entries.items()
            if entry.allowed and entry.until > now and entry.version[0] > self._conflicts.get(key, -1)
        }
