"""What is known of everybody: the newest record of each (domain, signer). SPEC.md, section Behaviour.

A state-based CRDT: whatever the order in which records come, and however often, the same set gives the same
view. Time comes in as `now` (monotonic seconds), what the certificates say as a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from math import inf
from typing import Final

from protocols.advert.leases import HEARSAY_S, SUSPECT_S, age_of, end_of, end_of_suspect
from protocols.advert.messages import ADVERT, HEAD, LEASE_MS, LOSS, Advert, Announcement, Loss
from protocols.advert.validate import check_advert, check_announcement, check_date, check_loss
from protocols.bucket import Buckets
from protocols.codec import decode
from protocols.envelope import ClaimedRecord, Opened
from protocols.ids import PeerId
from protocols.membership.messages import PUBLISH, SERVE
from protocols.notice.messages import ROLE_OF, Notice, check_notice

MAX_ENTRIES: Final = 8192  # of 1024 members: one of each kind
MAX_STRANGERS: Final = 256  # records of signers whose certificates have not come yet
RECORDS_PER_S: Final = 3.0  # new records of one signer that are taken; ours write two per second at most
RECORD_BURST: Final = 20.0
LOSS_BURST: Final = 128.0  # losses of one signer: half of a large mesh may vanish at once

Key = tuple[str, PeerId]  # domain, signer
Version = tuple[int, int]  # incarnation, sequence
Body = Advert | Announcement | Notice


class Outcome(Enum):
    """What became of a record."""

    CHANGED = "changed"  # newer, and says something else
    RENEWED = "renewed"  # newer, and says the same
    KNOWN = "known"  # held already
    OLD = "old"  # a newer one is held
    STRANGER = "stranger"  # kept, but without effect until the signer's certificate allows it
    IGNORED = "ignored"  # of an unknown domain, of a signer caught with two records, expired, or no room
    TOO_FAST = "too fast"  # its signer writes more than anybody needs to: neither kept nor passed on
    SUSPECT = "suspect"  # a loss: the advert of the lost one has to be renewed soon; the key is that of the advert
    CONFLICT = "conflict"  # the same version as the one held, but other content: two writers


@dataclass(slots=True)
class Entry:
    """The newest record of one signer in one domain."""

    version: Version
    body: Body
    payload: bytes
    record: bytes  # as received, to be passed on
    since: float  # when its version was new, by our clock (earlier, if it was old when it reached us)
    until: float  # when it ends; infinite for an announcement
    roles: frozenset[str] = frozenset()  # of the signer's certificate, when last looked
    counts: Body = field(init=False)  # of the body, what these roles allow
    cids: frozenset[bytes] = field(init=False)  # all holdings that count of an advert

    def __post_init__(self) -> None:
        self.judge(self.roles)

    def judge(self, roles: frozenset[str]) -> None:
        """Take the roles of the signer's certificate."""
        self.roles = roles
        self.counts = within(self.body, roles) if isinstance(self.body, Advert) else self.body
        holdings = self.counts.holdings if isinstance(self.counts, Advert) else ()
        self.cids = frozenset(cid for holding in holdings for cid in holding.cids)

    @property
    def leaving(self) -> bool:
        return isinstance(self.body, Advert) and self.body.leaving

    @property
    def contested(self) -> bool:
        return isinstance(self.body, Advert) and self.body.contested

    @property
    def allowed(self) -> bool:
        """Whether the signer may say this: any member an advert, a publisher an announcement."""
        match self.body:
            case Advert():
                return bool(self.roles)
            case Announcement():
                return PUBLISH in self.roles
            case Notice(kind=kind):
                return ROLE_OF[kind] in self.roles


def within(advert: Advert, roles: frozenset[str]) -> Advert:
    """What of an advert counts: layers and memory of who may serve, files of who may serve or publish."""
    if SERVE in roles:
        return advert
    holdings = advert.holdings if PUBLISH in roles else ()
    if not serves(advert) and holdings == advert.holdings:
        return advert
    return replace(advert, memory_bytes=0, serving=None, holdings=holdings)


def serves(advert: Advert) -> bool:
    """Whether a node says that it holds layers, means to, or has room for some."""
    serving = advert.serving
    return bool(advert.memory_bytes or (serving is not None and (serving.span or serving.target)))


def _read_advert(opened: Opened) -> Advert:
    advert = decode(Advert, opened.payload)
    check_advert(advert, opened.signer)
    return advert


def _read_announcement(opened: Opened) -> Announcement:
    announcement = decode(Announcement, opened.payload)
    check_announcement(announcement, opened.signer)
    return announcement


def _read_notice(opened: Opened) -> Notice:
    notice = decode(Notice, opened.payload)
    check_notice(notice, opened.domain, opened.signer)
    return notice


_READERS: Final[Mapping[str, Callable[[Opened], Body]]] = {
    ADVERT: _read_advert,
    HEAD: _read_announcement,
    **dict.fromkeys(ROLE_OF, _read_notice),
}


def _said(body: Body) -> Body:
    """The content of a record without what every renewal changes."""
    match body:
        case Advert():
            return replace(body, sequence=0, lease_ms=LEASE_MS)
        case Announcement():
            return replace(body, sequence=0)
        case Notice():
            return replace(body, incarnation=1, sequence=0)


class View:
    """The newest record of everybody."""

    def __init__(self, roles_of: Callable[[PeerId], frozenset[str] | None], us: PeerId = PeerId("")) -> None:
        """
        Args:
          roles_of: roles of a member's certificate; None or empty for who is not known as a member.
          us: whose view it is. What others have signed with our key is of interest however old it is.
        """
        self._us = us
        self._roles_of = roles_of
        self._entries: dict[Key, Entry] = {}
        self._rates = Buckets(RECORDS_PER_S, RECORD_BURST)
        self._losses = Buckets(RECORDS_PER_S, LOSS_BURST)
        self._held: dict[bytes, Key] = {}  # the records of the entries: each is checked once, however often it comes
        self._hearsay: dict[PeerId, float] = {}  # when others' word about a loss was last believed
        self._conflicts: dict[Key, int] = {}  # incarnation in which a signer wrote two records of one version

    def accept(self, data: bytes, now: float, wall_ms: int, *, age_s: float = 0.0) -> tuple[Outcome, Key]:
        """Take a record that came from anywhere.

        Args:
          wall_ms: UTC milliseconds.
          age_s: how long ago the giver saw it first; shortens its lease here.

        Raises:
          RemoteProtocolError: damaged, forged, or with content that nobody can use; Early: not yet.
        """
        held = self._held.get(data)
        if held is not None:
            return Outcome.KNOWN, held  # checked when it first came
        claimed = ClaimedRecord(data)
        key = (claimed.domain, claimed.signer)
        rates = self._losses if claimed.domain == LOSS else self._rates
        if rates.is_empty(key, now):
            return Outcome.TOO_FAST, key  # whoever has really signed so many; so it costs no check of a signature
        opened = claimed.open()
        if opened.domain == LOSS:
            rates.take(key, now)
            return self._accept_loss(opened, now)
        read = _READERS.get(opened.domain)
        if read is None:
            return Outcome.IGNORED, key
        body = read(opened)
        if not isinstance(body, Advert):
            check_date(body, wall_ms)
        version = (body.incarnation, body.sequence)
        if version[0] <= self._conflicts.get(key, -1):
            return Outcome.IGNORED, key
        known = self._entries.get(key)
        if known is not None and version <= known.version:
            if version < known.version:
                return Outcome.OLD, key
            if known.payload == opened.payload:
                return Outcome.KNOWN, key
            if not known.allowed:  # no member, no harm: it has no effect, and nothing of it is remembered
                self._drop(key)
                return Outcome.IGNORED, key
            self._conflicts[key] = version[0]
            return Outcome.CONFLICT, key
        if not self._rates.take(key, now):
            return Outcome.TOO_FAST, key
        entry = self._entry(key, body, opened.payload, data, now - age_s)
        if (entry.until <= now and key[1] != self._us) or (
            known is None and not self._make_room(now, stranger=not entry.allowed)
        ):
            return Outcome.IGNORED, key
        self._put(key, entry)
        if not entry.allowed:
            return Outcome.STRANGER, key
        same = known is not None and known.until > now and _said(known.body) == _said(body)
        return Outcome.RENEWED if same else Outcome.CHANGED, key

    def write(self, domain: str, body: Body, payload: bytes, record: bytes, now: float) -> None:
        """Take a record that we have signed ourselves: it is not verified. Never above a newer one under our name."""
        key = (domain, PeerId(body.peer))
        known = self._entries.get(key)
        if known is None or known.version < (body.incarnation, body.sequence):
            self._put(key, self._entry(key, body, payload, record, now))

    def _accept_loss(self, opened: Opened, now: float) -> tuple[Outcome, Key]:
        """A member has lost somebody; if we have heard nothing newer of the lost one, it has to speak up."""
        loss = decode(Loss, opened.payload)
        check_loss(loss, opened.signer)
        key = (ADVERT, PeerId(loss.lost))
        entry = self._entries.get(key)
        if not self._roles_of(opened.signer) or entry is None or entry.until <= now + SUSPECT_S:
            return Outcome.IGNORED, key
        heard = self._hearsay.get(key[1], -inf)
        if entry.version > (loss.incarnation, loss.sequence) or now < heard + HEARSAY_S:
            return Outcome.IGNORED, key
        self._hearsay[key[1]] = now
        entry.until = end_of_suspect(entry.until, now)
        return Outcome.SUSPECT, key

    def _put(self, key: Key, entry: Entry) -> None:
        before = self._entries.get(key)
        if before is not None:
            self._held.pop(before.record, None)
        self._entries[key] = entry
        self._held[entry.record] = key

    def _drop(self, key: Key) -> None:
        self._held.pop(self._entries.pop(key).record, None)
        self._hearsay.pop(key[1], None)

    def _entry(self, key: Key, body: Body, payload: bytes, record: bytes, since: float) -> Entry:
        known = self._entries.get(key)
        return Entry(
            version=(body.incarnation, body.sequence),
            body=body,
            payload=payload,
            record=record,
            since=since,
            until=end_of(body, since),
            roles=known.roles if known is not None and known.allowed else self._roles_of(key[1]) or frozenset(),
        )

    def _make_room(self, now: float, *, stranger: bool) -> bool:
        if stranger:
            strangers = [key for key, entry in self._entries.items() if not entry.allowed]
            if len(strangers) >= MAX_STRANGERS:
                self._drop(min(strangers, key=lambda key: (self._entries[key].since, key)))
        if len(self._entries) < MAX_ENTRIES:
            return True
        dead = [key for key, entry in self._entries.items() if entry.until <= now]
        if dead:
            self._drop(min(dead, key=lambda key: (self._entries[key].until, key)))
        return bool(dead)

    def review(self, *, strangers_only: bool) -> bool:
        """Look at the certificates again; whether anybody's standing changed."""
        changed = False
        for key, entry in self._entries.items():
            if not (strangers_only and entry.allowed):
                roles = self._roles_of(key[1]) or frozenset()
                if roles != entry.roles:
                    before = entry.allowed, entry.counts
                    entry.judge(roles)
                    changed |= (entry.allowed, entry.counts) != before
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
            and not entry.contested
            and entry.version[0] > self._conflicts.get(key, -1)
        }

    def next_end(self, now: float) -> float:
        """When the next lease of an advert ends that counts now; infinite when there is none."""
        return min((entry.until for entry in self.alive(ADVERT, now).values()), default=float("inf"))

    def versions(self) -> dict[Key, Version]:
        """Everything that was ever seen, dead records too: nobody needs to send it again."""
        return {key: entry.version for key, entry in self._entries.items()}

    def shareable(self, now: float, reader: PeerId) -> dict[Key, tuple[bytes, float]]:
        """Records worth giving to `reader`, each with its age in seconds: of members, lease running.

        Its own ones always: one that it did not write tells it that another node has its key, and which version
        it has to outbid to be believed again.
        """
        return {
            key: (entry.record, age_of(key[0], entry.since, now))
            for key, entry in self._entries.items()
            if entry.allowed
            and (key[1] == reader or (entry.until > now and entry.version[0] > self._conflicts.get(key, -1)))
        }
