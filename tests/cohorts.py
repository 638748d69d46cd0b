"""Cohorts of members that speak through memory, with delays, losses and liars."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from protocols.cohort import events
from protocols.cohort.cohorts import Cohort
from protocols.cohort.events import Blame, Effect, Event, Expired, Fail, Fetch, Heard, Mask, Say, Stored, Unmask
from protocols.cohort.machine import CohortMachine, Rules, State
from protocols.cohort.masking import Sum, masked
from protocols.cohort.messages import Word, open_word, sign_word
from protocols.delta.frame import Vector
from protocols.errors import RemoteProtocolError
from protocols.ids import RAW, PeerId, cid_of, cid_to_bytes
from tests.deltas import key_of, peer_of

NAMES = ("ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal")
LINEAGE = "a lineage"
STEPS = ("nothing", "keys", "shares", "masked", "reveal")  # after which a member may vanish


def cohort_of(count: int, round_number: int = 3) -> Cohort:
    return Cohort.of(LINEAGE, round_number, tuple(PeerId(peer_of(name)) for name in NAMES[:count]))


@dataclass
class Member:
    machine: CohortMachine
    vector: Vector
    leaves: str = ""  # after having said this
    lies: Callable[[Word, int], Word] | None = None  # (word, number of the listener) -> what it hears
    said: list[Word] = field(default_factory=list)
    blamed: list[tuple[int, str]] = field(default_factory=list)
    payload: bytes = b""
    mean: Vector | None = None
    survivors: tuple[PeerId, ...] = ()
    failed: str = ""
    woken: float | None = None

    @property
    def gone(self) -> bool:
        return bool(self.leaves) and (self.leaves == "nothing" or bool(self.said and self._has(self.said[-1])))

    def _has(self, word: Word) -> bool:
        return getattr(word, self.leaves) is not None


@lru_cache(64)
def received(name: str, word: Word) -> Word:
    """As it arrives: signed, sent, opened and checked."""
    return open_word(sign_word(key_of(name), word))


class Table:
    """All members of a cohort. Words take `delay()` seconds; every word is signed, sent as bytes and opened."""

    def __init__(self, count: int, parameters: int = 50, seed: int = 0, rules: Rules | None = None) -> None:
        self.cohort = cohort_of(count)
        self.rules = rules or Rules(parameters=parameters)
        self.rng = random.Random(seed)
        chance = np.random.default_rng(seed)
        self.members = [
            Member(
                CohortMachine(peer, self.cohort, self.rules, self.rng.randbytes(32)),
                chance.normal(0, 1, parameters).astype(np.float32),
            )
            for peer in self.cohort.members
        ]
        self.delay: Callable[[int, int], float | None] = lambda sender, listener: 0.1
        self.starts: Callable[[int], float] = lambda number: 0.0
        self.behind: frozenset[PeerId] = frozenset()
        self.now = 0.0
        self._queue: list[tuple[float, int, int, Event | None]] = []
        self._count = 0
        self._files: dict[str, bytes] = {}

    def run(self, until: float = 2000.0) -> None:
        for number in range(len(self.members)):
            self._later(self.starts(number), number, events.Begin(self.behind))
        while self._queue and self.now < until:
            self.now, _, number, event = heapq.heappop(self._queue)
            member = self.members[number]
            if event is None:
                if member.machine.deadline is None or member.machine.deadline > self.now:
                    continue
                event = Expired()
            if member.gone or not member.machine.expects(event):
                continue
            self._carry_out(number, member.machine.handle(event, self.now))
            deadline = member.machine.deadline
            if deadline is not None and deadline != member.woken:
                member.woken = deadline
                self._later(deadline, number, None)

    def _later(self, when: float, number: int, event: Event | None) -> None:
        self._count += 1
        heapq.heappush(self._queue, (when, self._count, number, event))

    def _carry_out(self, number: int, effects: tuple[Effect, ...]) -> None:
        member = self.members[number]
        for effect in effects:
            if member.gone:
                return
            match effect:
                case Say(word):
                    member.said.append(word)
                    self._spread(number, word)
                case Mask(pads):
                    member.payload = masked(member.vector, pads)
                    cid = cid_of(RAW, member.payload)
                    self._files[cid] = member.payload
                    self._later(self.now + 0.1, number, Stored(cid_to_bytes(cid), len(member.payload)))
                case Fetch(peer, cid, size):
                    if cid in self._files:
                        assert len(self._files[cid]) == size
                        self._later(self.now + 0.1, number, events.Fetched(peer))
                case Unmask(survivors, files, pads):
                    total = Sum(self.rules.parameters)
                    for file in files:
                        total.add(self._files[file.name])
                    member.survivors = survivors
                    try:
                        member.mean = total.mean(pads)
                    except RemoteProtocolError as error:
                        member.failed = str(error)
                case Blame(peer, reason):
                    member.blamed.append((self.cohort.members.index(peer), reason))
                case Fail(reason):
                    member.failed = reason

    def _spread(self, number: int, word: Word) -> None:
        lies = self.members[number].lies
        for listener in range(len(self.members)):
            delay = self.delay(number, listener)
            if listener != number and delay is not None:
                told = word if lies is None else lies(word, listener)
                heard = received(NAMES[number], told)
                self._later(max(self.now, self.starts(listener)) + delay, listener, Heard(heard))

    # ------------------------------------------------------------ afterwards

    @property
    def there(self) -> list[Member]:
        return [member for member in self.members if not member.gone]

    def mean(self, survivors: tuple[PeerId, ...]) -> Vector:
        """What the plain mean of these would be."""
        chosen = [self.members[self.cohort.members.index(peer)].vector for peer in survivors]
        return np.mean(np.stack(chosen).astype(np.float64), axis=0).astype(np.float32)

    def revealed(self) -> dict[int, tuple[set[int], set[int]]]:
        """Who has given away a share of each member's seed, and of its key."""
        found: dict[int, tuple[set[int], set[int]]] = {i: (set(), set()) for i in range(len(self.members))}
        for number, member in enumerate(self.members):
            for word in member.said:
                if word.reveal is None or word.masked is None:
                    continue
                for owner in range(len(self.members)):
                    if word.masked.among >> owner & 1:
                        found[owner][0 if word.reveal.survivors >> owner & 1 else 1].add(number)
        return found

    def states(self) -> list[State]:
        return [member.machine.state for member in self.members]
