"""The walk towards a key: whom to ask next, and when it is over. A state machine without I/O.

Rule 1: a candidate's status changes by TRANSITIONS and nowhere else.
Rule 2: no clock, no randomness, no await. Time comes in as `now` (seconds, monotonic), a wish to be woken goes out
as `deadline`, orders go out as effects.
Rule 3: what answers say costs a bounded amount: candidates, questions and providers have limits, and so has the
whole walk in time, however many nearer peers a hostile one invents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from protocols.errors import LocalProtocolError
from protocols.ids import PeerId
from protocols.kad.messages import Kind, Peer, place, place_of

K: Final = 20  # peers that hold a record (libp2p specs, kad-dht)
ALPHA: Final = 3  # questions under way, not counting slow ones (Kademlia paper)
MAX_UNDER_WAY: Final = 8  # questions under way with the slow ones
SLOW_S: Final = 1.5  # a question this old makes room for another; on the open network many peers are gone
LOOKUP_S: Final = 60.0
MAX_ASKED: Final = 100
MAX_CANDIDATES: Final = 256
MAX_FOUND: Final = 32


class Status(Enum):
    """What has come of one candidate."""

    NEW = "new"
    ASKED = "asked"
    SLOW = "slow"  # asked long ago
    ANSWERED = "answered"
    FAILED = "failed"


class Verb(Enum):
    """What happens to a candidate."""

    ASK = "ask"
    LATE = "late"
    ANSWER = "answer"
    FAIL = "fail"


TRANSITIONS: Final[dict[tuple[Status, Verb], Status]] = {
    (Status.NEW, Verb.ASK): Status.ASKED,
    (Status.ASKED, Verb.LATE): Status.SLOW,
    (Status.ASKED, Verb.ANSWER): Status.ANSWERED,
    (Status.ASKED, Verb.FAIL): Status.FAILED,
    (Status.SLOW, Verb.ANSWER): Status.ANSWERED,
    (Status.SLOW, Verb.FAIL): Status.FAILED,
}


@dataclass(frozen=True, slots=True)
class Begin:
    """Start with these peers."""

    seeds: tuple[Peer, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """A peer that was asked said this. Peers without an address that may be dialled are left out by the driver."""

    peer: PeerId
    closer: tuple[Peer, ...] = ()
    providers: tuple[Peer, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """A peer that was asked can't be reached, broke the rules or took too long."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Tick:
    """The deadline has passed."""


Event = Begin | Answered | Failed | Tick


@dataclass(frozen=True, slots=True)
class Ask:
    """Send the question to this peer; `Answered` or `Failed` must follow."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class Found:
    """Somebody who is said to provide the key; the same peer again only when it has got addresses since."""

    provider: Peer


@dataclass(frozen=True, slots=True)
class Done:
    """The walk is over. `closest`: at most K peers that answered, nearest first."""

    closest: tuple[Peer, ...]
    reason: str


Effect = Ask | Found | Done


@dataclass(slots=True)
class _Candidate:
    peer: Peer
    distance: int
    status: Status = Status.NEW
    asked_at: float = 0.0

    def step(self, verb: Verb) -> None:
        after = TRANSITIONS.get((self.status, verb))
        if after is None:
            raise LocalProtocolError(f"{verb.value} to {self.peer.id}, which is {self.status.value}")
        self.status = after


class Lookup:
    """One walk: FIND_NODE for the peers nearest to a key, or GET_PROVIDERS."""

    def __init__(self, kind: Kind, key: bytes, us: PeerId, now: float, *, wanted: int = MAX_FOUND) -> None:
        """`wanted`: the walk ends when so many providers with an address were found."""
        if kind not in (Kind.FIND_NODE, Kind.GET_PROVIDERS):
            raise LocalProtocolError(f"{kind.name} is no question for a walk")
        self.kind = kind
        self.key = key
        self.deadline: float | None = None
        self.over = False
        self._us = us
        self._target = place(key)
        self._ends = now + LOOKUP_S
        self._wanted = wanted
        self._asked = 0
        self._candidates: dict[PeerId, _Candidate] = {}
        self._found: dict[PeerId, bool] = {}  # provider -> with an address

    def handle(self, event: Event, now: float) -> tuple[Effect, ...]:
        """Take one event. What comes after the end is ignored.

        Raises LocalProtocolError for an answer of a peer that was not asked: the driver's mistake.
        """
        if self.over:
            return ()
        out: list[Effect] = []
        match event:
            case Begin(seeds):
                self._learn(seeds)
            case Answered(peer, closer, providers):
                self._asked_one(peer).step(Verb.ANSWER)
                self._learn(closer)
                out += self._note(providers)
            case Failed(peer):
                self._asked_one(peer).step(Verb.FAIL)
            case Tick():
                for candidate in self._with(Status.ASKED):
                    # The same sum as the deadline's: a difference may be rounded to just below.
                    if now >= candidate.asked_at + SLOW_S:
                        candidate.step(Verb.LATE)
        reason = self._reason(now)
        if not reason:
            out += self._ask(now)
            reason = self._reason(now)
        if reason:
            self.over = True
            self.deadline = None
            out.append(Done(self._closest(), reason))
            return tuple(out)
        late = min((c.asked_at + SLOW_S for c in self._with(Status.ASKED)), default=self._ends)
        self.deadline = min(self._ends, late)
        return tuple(out)

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """Where the walk has heard that a peer is."""
        candidate = self._candidates.get(peer)
        return candidate.peer.addresses if candidate is not None else ()

    def _asked_one(self, peer: PeerId) -> _Candidate:
        if peer not in self._candidates:
            raise LocalProtocolError(f"{peer} was not asked")
        return self._candidates[peer]

    def _with(self, *statuses: Status) -> Iterator[_Candidate]:
        return (c for c in self._candidates.values() if c.status in statuses)

    def _learn(self, peers: Iterable[Peer]) -> None:
        for peer in peers:
            if peer.id != self._us and peer.addresses and peer.id not in self._candidates:
                self._candidates[peer.id] = _Candidate(peer, place_of(peer.id) ^ self._target)
        spare = len(self._candidates) - MAX_CANDIDATES
        if spare > 0:
            new = sorted(self._with(Status.NEW), key=lambda c: c.distance)
            for candidate in new[-spare:]:
                del self._candidates[candidate.peer.id]

    def _note(self, providers: Iterable[Peer]) -> Iterator[Found]:
        for provider in providers:
            placed = bool(provider.addresses)
            if provider.id == self._us or self._found.get(provider.id, False) or len(self._found) >= MAX_FOUND:
                continue
            if provider.id not in self._found or placed:
                self._found[provider.id] = placed
                yield Found(provider)

    def _nearest(self) -> list[_Candidate]:
        """The K nearest that have not failed."""
        alive = [c for c in self._candidates.values() if c.status is not Status.FAILED]
        return sorted(alive, key=lambda c: c.distance)[:K]

    def _closest(self) -> tuple[Peer, ...]:
        answered = sorted(self._with(Status.ANSWERED), key=lambda c: c.distance)
        return tuple(c.peer for c in answered[:K])

    def _ask(self, now: float) -> Iterator[Ask]:
        fresh = sum(1 for _ in self._with(Status.ASKED))
        under_way = fresh + sum(1 for _ in self._with(Status.SLOW))
        for candidate in self._nearest():
            if fresh >= ALPHA or under_way >= MAX_UNDER_WAY or self._asked >= MAX_ASKED:
                return
            if candidate.status is Status.NEW:
                candidate.step(Verb.ASK)
                candidate.asked_at = now
                self._asked += 1
                fresh += 1
                under_way += 1
                yield Ask(candidate.peer)

    def _reason(self, now: float) -> str:
        """Why the walk is over; "" while it is not."""
        if sum(self._found.values()) >= self._wanted:
            return "enough providers were found"
        if now >= self._ends:
            return f"{LOOKUP_S:.0f} s are over"
        if any(self._with(Status.ASKED, Status.SLOW)):
            waits = any(c.status is not Status.ANSWERED for c in self._nearest())
            return "" if waits else "the nearest peers have answered"
        if self._asked >= MAX_ASKED:
            return f"{MAX_ASKED} peers were asked"
        if any(c.status is Status.NEW for c in self._nearest()):
            return ""
        return "the nearest peers have answered" if any(self._with(Status.ANSWERED)) else "nobody answered"
