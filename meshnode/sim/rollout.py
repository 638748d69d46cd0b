"""Roll-outs in virtual time: hundreds of nodes with the real machine, some of which lie; votes, errors, partitions.

What a node says is heard by all others on its side a tick later. Honest voters need time for their votes, and see the
change in loss with the noise that samples have. Liars say at once the opposite of what is true, in votes, revocations
and reports.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from protocols.ids import DAG_CBOR, RAW, Cid, PeerId, cid_of
from protocols.rollout.count import Count, People, Words, count
from protocols.rollout.events import (
    Answered,
    Effect,
    Expired,
    Heard,
    Judge,
    Judged,
    Pace,
    Proposed,
    Say,
    Serving,
)
from protocols.rollout.machine import Rollout
from protocols.rollout.memory import Memory
from protocols.rollout.messages import (
    SUITE,
    Ballots,
    Candidate,
    Candidates,
    Content,
    Revocation,
    Revocations,
    Tallies,
    Tally,
    Vote,
    candidate_id,
)
from protocols.rollout.skew import Served

EPOCH_S: Final = 100.0  # votes are collected for one, and a step of a roll-out lasts one
TICK_S: Final = 25.0
PACE: Final = Pace(collect_s=EPOCH_S, soak_s=EPOCH_S, report_s=EPOCH_S / 2, retry_s=EPOCH_S)
SAMPLES: Final = 256
SPREAD: Final = 0.08  # standard deviation of one sample's change in loss, nats
LOSS: Final = 0.5  # before
ANSWERS: Final = 5  # of one node in a tick
USUAL: Final = 0.05  # of them are wrong
LIE: Final = 0.05  # nats by which liars exaggerate
MOST: Final = 0.08  # of all nodes may ever use a worse candidate
ALONE: Final = 0.03  # of all nodes may go back from a good one by chance; the test allows 0.01 on average


def _cid(codec: int, name: str) -> Cid:
    return cid_of(codec, name.encode())


SERVED: Final = Served(base=_cid(DAG_CBOR, "model"), version="v1.0.0-0", suite=_cid(RAW, "suite"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What a candidate really is."""

    delta: float  # nats that it is worse
    wrong: float = USUAL  # of its answers


def candidate(name: str, counter: int, previous: str = "") -> Candidate:
    """One that is named so."""
    return Candidate(
        adapter=_cid(DAG_CBOR, name),
        base=SERVED.base,
        frame=_cid(DAG_CBOR, "frame"),
        suite=SERVED.suite,
        version=f"v1.0.0-{counter}",
        previous=previous,
    )


@dataclass(slots=True)
class Member:
    """One node."""

    peer: PeerId
    machine: Rollout
    lies: bool
    side: int = 0
    voter: bool = True
    says: dict[type, Content] = field(default_factory=dict)
    due: list[tuple[float, Vote]] = field(default_factory=list)  # votes that take time


class World:
    """All nodes, and what is true."""

    def __init__(self, nodes: int, liars: int, seed: int, *, slowest: float = 1.5) -> None:
        """`slowest`: epochs that an honest voter needs at most."""
        self.now = 0.0
        self.chance = random.Random(seed)
        self.truth: dict[str, Truth] = {}
        self._slowest_s = slowest * EPOCH_S
        self._counted: dict[int, tuple[Words, Count]] = {}
        lying = set(self.chance.sample(range(nodes), liars))
        self.members = [self._member(PeerId(f"node-{number:04}"), lies=number in lying) for number in range(nodes)]

    def _member(self, peer: PeerId, *, lies: bool) -> Member:
        member = Member(peer, Rollout(peer, PACE), lies)
        member.machine.handle(Serving(SERVED), self.now)
        return member

    def propose(self, by: int, one: Candidate, truth: Truth) -> None:
        """A node proposes a candidate; all liars lie about it from now on."""
        self.truth[candidate_id(one)] = truth
        proposer = self.members[by]
        for effect in proposer.machine.handle(Proposed(one), self.now):
            if isinstance(effect, Say):
                self._say(proposer, effect.content)
        for liar in (member for member in self.members if member.lies):
            self._lie(liar, one, truth)

    def _lie(self, liar: Member, one: Candidate, truth: Truth) -> None:
        good = truth.delta < 0 and truth.wrong <= USUAL
        worse = LIE if good else -LIE
        vote = self._vote(candidate_id(one), worse, 0.0)
        self._say(liar, Ballots(votes=(vote,)))
        tally = Tally(candidate=one, released=not good, right=50, wrong=50 if good else 0)
        self._say(liar, Tallies(base=one.base, seen=(tally,)))
        if good:
            lie = Revocation(adapter=one.adapter, ground=SUITE, why="it is clearly worse on the held-out samples")
            self._say(liar, Revocations(revoked=(lie,)))

    @staticmethod
    def _vote(cid: str, delta: float, error: float) -> Vote:
        return Vote(
            candidate=cid,
            samples=SAMPLES,
            loss_new=round(max(LOSS + delta, 0.0) * 1e6),
            loss_old=round(LOSS * 1e6),
            ci95=round(1.96 * error * 1e6),
        )

    def restart(self, member: Member, memory: Memory) -> None:
        """A node that remembers no more than this."""
        member.machine = Rollout(member.peer, PACE, memory)
        self._act(member, member.machine.handle(Serving(SERVED), self.now))
        self._counted.clear()

    # ------------------------------------------------------------ time

    def run(self, epochs: float, until: Callable[[], bool] = lambda: False) -> float:
        """So many epochs, or until something is so; how many passed."""
        began = self.now
        while self.now < began + epochs * EPOCH_S and not until():
            self._tick()
        return (self.now - began) / EPOCH_S

    def _tick(self) -> None:
        self.now += TICK_S
        for member in self.members:
            if not member.lies:
                self._vote_when_due(member)
            self._answer(member)
        for side in sorted({member.side for member in self.members}):
            here = [member for member in self.members if member.side == side]
            new = self._count_anew(side, here)
            for member in here:
                if new is not None:
                    self._act(member, member.machine.handle(Heard(new), self.now))
                elif member.machine.deadline <= self.now:
                    self._act(member, member.machine.handle(Expired(), self.now))

    def _count_anew(self, side: int, here: Sequence[Member]) -> Count | None:
        """What is said on one side, if it is not what was said a tick ago."""
        words = Words(
            candidates={m.peer: said for m in here if isinstance(said := m.says.get(Candidates), Candidates)},
            ballots={m.peer: said for m in here if isinstance(said := m.says.get(Ballots), Ballots)},
            tallies={m.peer: said for m in here if isinstance(said := m.says.get(Tallies), Tallies)},
            revocations={m.peer: said for m in here if isinstance(said := m.says.get(Revocations), Revocations)},
        )
        people = People(
            voters={member.peer: member.peer for member in here if member.voter},
            present=frozenset(member.peer for member in here),
        )
        before = self._counted.get(side)
        if before is not None and before[0] == words and before[1].present == people.present:
            return None
        counted = count(words, people)
        self._counted[side] = words, counted
        return counted

    def _vote_when_due(self, member: Member) -> None:
        for due in [one for one in member.due if one[0] <= self.now]:
            member.due.remove(due)
            self._act(member, member.machine.handle(Judged(due[1]), self.now))

    def _answer(self, member: Member) -> None:
        """Questions of one node, answered with what it uses."""
        used = member.machine.current
        rate = USUAL if used is None else self.truth[candidate_id(used)].wrong
        for _ in range(ANSWERS):
            wrong = self.chance.random() < rate
            answered = Answered(used.adapter if used is not None else "", wrong)
            self._act(member, member.machine.handle(answered, self.now))

    def _act(self, member: Member, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Say(content=content):
                    if not member.lies:
                        self._say(member, content)
                case Judge(id=cid, candidate=one):
                    error = SPREAD / SAMPLES**0.5
                    seen = self.chance.gauss(self.truth[candidate_id(one)].delta, error)
                    wait = self.chance.uniform(0, self._slowest_s)
                    member.due.append((self.now + wait, self._vote(cid, seen, error)))
                case _:
                    pass

    @staticmethod
    def _say(member: Member, content: Content) -> None:
        member.says[type(content)] = content

    # ------------------------------------------------------------ looking

    def share(self, one: Candidate | None) -> float:
        """Part of all nodes whose questions use this adapter."""
        return sum(member.machine.current == one for member in self.members) / len(self.members)

    def released(self, one: Candidate) -> float:
        """Part of all nodes for which its roll-out is over, and that serve nothing newer."""
        return sum(member.machine.head == one for member in self.members) / len(self.members)

    def revoked(self, one: Candidate) -> float:
        """Part of all nodes that will never use it again."""
        return sum(
            any(gone.adapter == one.adapter for gone in member.machine.memory().gone) for member in self.members
        ) / len(self.members)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one roll-out ended."""

    delta: float
    liars: int
    seed: int
    most: float  # the greatest part of the nodes that used it at one time
    released: float
    used: float  # in the end; who saw too many wrong answers by chance has gone back alone
    revoked: float
    epochs: float

    @property
    def is_right(self) -> bool:
        """A better candidate is released everywhere; a worse one nowhere, and never used by many."""
        if self.delta < 0:
            return self.released == 1.0 and self.revoked == 0.0 and self.used >= 1 - ALONE
        return self.used == 0.0 and self.revoked == 1.0 and self.most <= MOST


def roll_out(truth: Truth, *, nodes: int, liars: int, seed: int, epochs: float = 20, slowest: float = 1.5) -> Outcome:
    """One candidate, from its proposal until every node has decided."""
    world = World(nodes, liars, seed, slowest=slowest)
    one = candidate(f"adapter {seed}", 1)
    world.propose(0, one, truth)
    most = 0.0

    def decided() -> bool:
        nonlocal most
        most = max(most, world.share(one))
        return world.released(one) == 1.0 or (world.revoked(one) == 1.0 and world.share(one) == 0.0)

    took = world.run(epochs, decided)
    return Outcome(
        delta=truth.delta,
        liars=liars,
        seed=seed,
        most=most,
        released=world.released(one),
        used=world.share(one),
        revoked=world.revoked(one),
        epochs=took,
    )
