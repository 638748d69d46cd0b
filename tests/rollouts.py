"""Candidates, votes and a world of words for tests of roll-outs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from protocols.ids import DAG_CBOR, RAW, Cid, PeerId, cid_of
from protocols.rollout.count import Count, People, Words, count
from protocols.rollout.events import Effect, Expired, Heard, Judge, Pace, Say, Serving, Use
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
    Vote,
    candidate_id,
)
from protocols.rollout.skew import Served

PACE = Pace(collect_s=100, soak_s=1000, report_s=10, retry_s=50)


def block(name: str) -> Cid:
    return cid_of(DAG_CBOR, name.encode())


SERVED = Served(base=block("model"), version="v1.0.0-0", suite=cid_of(RAW, b"suite"))


def candidate_of(name: str, counter: int = 1, previous: str = "", **fields: Any) -> Candidate:
    one = Candidate(
        adapter=block(name),
        base=SERVED.base,
        frame=block("frame"),
        suite=SERVED.suite,
        version=f"v1.0.0-{counter}",
        previous=previous,
    )
    return replace(one, **fields)


def vote_of(one: Candidate, delta: float, *, samples: int = 64, ci95: float = 0.001) -> Vote:
    """`delta`, `ci95`: nats."""
    return Vote(
        candidate=candidate_id(one),
        samples=samples,
        loss_new=500_000 + round(delta * 1e6),
        loss_old=500_000,
        ci95=round(ci95 * 1e6),
    )


def revocation_of(one: Candidate, ground: str = SUITE, why: str = "it is worse") -> Revocation:
    return Revocation(adapter=one.adapter, ground=ground, why=why)


@dataclass(slots=True)
class Town:
    """What members say, by their short names, and one node's machine that hears it."""

    voters: tuple[str, ...]
    us: str = ""
    others: tuple[str, ...] = ()  # who are there and have no vote
    branches: Mapping[str, str] = field(default_factory=dict)
    founders: tuple[str, ...] = ()
    said: dict[tuple[str, type], Content] = field(default_factory=dict)
    effects: list[Effect] = field(default_factory=list)
    now: float = 0.0
    machine: Rollout = field(init=False)

    def __post_init__(self) -> None:
        self.us = self.us or self.voters[0]
        self.restart(None)

    def restart(self, memory: Memory | None) -> None:
        self.machine = Rollout(PeerId(self.us), PACE, memory)
        self.handle(Serving(SERVED))

    def handle(self, event: Any) -> list[Effect]:
        effects = list(self.machine.handle(event, self.now))
        for effect in effects:
            if isinstance(effect, Say):
                self.said[self.us, type(effect.content)] = effect.content
        self.effects += effects
        return effects

    def words(self, kind: type[Any]) -> dict[PeerId, Any]:
        return {PeerId(who): content for (who, said), content in self.said.items() if said is kind}

    def count(self) -> Count:
        words = Words(
            candidates=self.words(Candidates),
            ballots=self.words(Ballots),
            tallies=self.words(Tallies),
            revocations=self.words(Revocations),
        )
        return count(
            words,
            People(
                voters={PeerId(who): PeerId(self.branches.get(who, who)) for who in self.voters},
                founders=frozenset(map(PeerId, self.founders)),
                present=frozenset(map(PeerId, (*self.voters, *self.others))),
            ),
        )

    def hear(self) -> list[Effect]:
        return self.handle(Heard(self.count()))

    def propose(self, *proposed: Candidate, by: str = "") -> None:
        self.said[by or self.voters[0], Candidates] = Candidates(proposed=proposed)

    def vote(self, who: Iterable[str], *votes: Vote) -> None:
        for voter in who:
            before = self.said.get((voter, Ballots), Ballots(votes=()))
            assert isinstance(before, Ballots)
            self.said[voter, Ballots] = Ballots(votes=(*votes, *before.votes))

    def revoke(self, who: Iterable[str], one: Candidate, ground: str = SUITE) -> None:
        for voter in who:
            self.said[voter, Revocations] = Revocations(revoked=(revocation_of(one, ground),))

    def pass_time(self, seconds: float) -> list[Effect]:
        """Wake the machine whenever it wants to be woken."""
        until, effects = self.now + seconds, list[Effect]()
        while self.machine.deadline <= until:
            self.now = max(self.now, self.machine.deadline)
            effects += self.handle(Expired())
            effects += self.hear()
        self.now = until
        return effects

    def uses(self) -> list[Candidate | None]:
        """What the machine has ordered to be used, in order."""
        return [effect.candidate for effect in self.effects if isinstance(effect, Use)]

    def judging(self) -> list[Candidate]:
        return [effect.candidate for effect in self.effects if isinstance(effect, Judge)]
