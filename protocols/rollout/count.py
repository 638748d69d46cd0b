"""What all words together say about each candidate: a pure count, the same at every node that has heard the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Self

from protocols.ids import Cid, PeerId
from protocols.rollout.messages import (
    MAX_CANDIDATES,
    PERSON,
    Ballots,
    Candidate,
    Candidates,
    Revocation,
    Revocations,
    Tallies,
    Tally,
    Version,
    Vote,
    candidate_id,
)
from protocols.rollout.sprt import likelihood, usual_rate
from protocols.rollout.weights import total, upper_median, weights

LEAST_VOTES: Final = 3  # or all voters, where there are fewer
QUORUM: Final = 5  # at least the 5th part of the weight of all voters must have voted
THIRD: Final = 3  # votes in favour beyond the canary, and revocations: so many can't all be lies
BETTER: Final = -2_000  # micro-nats: so much better the median of the votes must be
LEAST_SAMPLES: Final = 8  # of a vote that counts
MAX_COUNTED: Final = 64  # candidates that are looked at, those with the most voters first


@dataclass(frozen=True, slots=True, kw_only=True)
class People:
    """Who is there."""

    voters: Mapping[PeerId, PeerId] = field(default_factory=dict)  # members with the role vote -> their branch
    founders: frozenset[PeerId] = frozenset()  # founders' devices
    present: frozenset[PeerId] = frozenset()  # nodes with a live advert, ourselves among them


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The contents of all notices that are checked (`check_content`), by signer."""

    candidates: Mapping[PeerId, Candidates] = field(default_factory=dict)
    ballots: Mapping[PeerId, Ballots] = field(default_factory=dict)
    tallies: Mapping[PeerId, Tallies] = field(default_factory=dict)
    revocations: Mapping[PeerId, Revocations] = field(default_factory=dict)


class Stand(Enum):
    """What the votes say."""

    OPEN = "open"  # too few yet
    GOOD = "good"  # better, says the quorum for the canary
    SURE = "sure"  # the same, and more in favour than liars could be
    NO_BETTER = "no better"
    WORSE = "worse"  # by more than half of all voters


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """A candidate and what is said of it."""

    candidate: Candidate
    proposers: tuple[PeerId, ...]  # that stand by it now
    stand: Stand
    why: str  # a clause for people: "7 of 12 voters ..."
    voted: frozenset[PeerId]
    favour: frozenset[PeerId]  # voted that it is better
    median: int | None  # micro-nats; None: no votes
    seen: Mapping[PeerId, float]  # who has seen answers of it: how likely it is that it fails too often (sprt.py)
    most_released: bool  # whether its roll-out is over for more than half of the weight of all voters

    @classmethod
    def unheard(cls, candidate: Candidate) -> Self:
        """One of which nobody says anything now."""
        return cls(
            candidate=candidate,
            proposers=(),
            stand=Stand.OPEN,
            why="nobody proposes it now, and nobody votes on it",
            voted=frozenset(),
            favour=frozenset(),
            median=None,
            seen={},
            most_released=False,
        )

    @property
    def counter(self) -> int:
        """Of its version."""
        return Version.parse(self.candidate.version).adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """All of it."""

    of: Mapping[Cid, Counted]
    weight: Mapping[PeerId, int]  # of each voter
    revoked: Mapping[str, str]  # adapters that must not be served -> why, a clause for people
    present: frozenset[PeerId]


def count(words: Words, people: People) -> Count:
    """Judge every candidate that is proposed or in use. A voter counts while it is there or is heard."""
    heard = words.ballots.keys() | words.revocations.keys() | people.present
    branches = {voter: branch for voter, branch in sorted(people.voters.items()) if voter in heard}
    weight = weights(branches)
    votes = _votes(words, branches)
    proposed = _proposed(words)
    used = _used(words)
    found = {candidate_id(candidate): candidate for candidate in proposed.keys() | used.keys()}

    def rank(cid: Cid) -> tuple[int, int, str]:
        """Those with votes, then the newest of each proposer: nobody can crowd out the others with a long list."""
        places = proposed.get(found[cid])
        return -len(votes[cid]), min(places.values()) if places else MAX_CANDIDATES, cid

    return Count(
        of={
            cid: _counted(
                found[cid],
                tuple(sorted(proposed.get(found[cid], ()))),
                votes[cid],
                branches,
                weight,
                used.get(found[cid], _Use()),
            )
            for cid in sorted(found, key=rank)[:MAX_COUNTED]
        },
        weight=weight,
        revoked=_revoked(words, people.founders, branches, weight),
        present=people.present,
    )


def _proposed(words: Words) -> dict[Candidate, dict[PeerId, int]]:
    """Who proposes each candidate, and at which place of its list."""
    proposed: defaultdict[Candidate, dict[PeerId, int]] = defaultdict(dict)
    for peer, said in words.candidates.items():
        for place, candidate in enumerate(said.proposed):
            proposed[candidate][peer] = place
    return proposed


@dataclass(slots=True)
class _Use:
    """What nodes report of a candidate."""

    seen: dict[PeerId, float] = field(default_factory=dict)  # how likely it is that it fails too often
    released: list[PeerId] = field(default_factory=list)


def _used(words: Words) -> dict[Candidate, _Use]:
    used: defaultdict[Candidate, _Use] = defaultdict(_Use)
    for peer, report in words.tallies.items():
        for tally in report.seen:
            if tally.candidate is None:
                continue
            use = used[tally.candidate]
            if tally.released:
                use.released.append(peer)
            if tally.right + tally.wrong:
                usual = usual_of(report.seen, tally.candidate.previous)
                use.seen[peer] = likelihood(tally.right, tally.wrong, usual)
    return used


def _votes(words: Words, voters: Iterable[PeerId]) -> defaultdict[str, dict[PeerId, Vote]]:
    votes: defaultdict[str, dict[PeerId, Vote]] = defaultdict(dict)
    for voter in voters:
        said = words.ballots.get(voter)
        for vote in said.votes if said is not None else ():
            if vote.samples >= LEAST_SAMPLES:
                votes[vote.candidate][voter] = vote
    return votes


def _counted(
    candidate: Candidate,
    proposers: tuple[PeerId, ...],
    votes: Mapping[PeerId, Vote],
    branches: Mapping[PeerId, PeerId],
    weight: Mapping[PeerId, int],
    use: _Use,
) -> Counted:
    favour = frozenset(voter for voter, vote in votes.items() if vote.delta <= BETTER)
    stand, why, median = _judge(votes, favour, branches, weight)
    return Counted(
        candidate=candidate,
        proposers=proposers,
        stand=stand,
        why=why,
        voted=frozenset(votes),
        favour=favour,
        median=median,
        seen=use.seen,
        most_released=2 * total(weight, use.released) > sum(weight.values()),
    )


def _judge(
    votes: Mapping[PeerId, Vote],
    favour: frozenset[PeerId],
    branches: Mapping[PeerId, PeerId],
    weight: Mapping[PeerId, int],
) -> tuple[Stand, str, int | None]:
    """What the votes say, why in a clause, and their median."""
    everybody = sum(weight.values())
    among = weights({voter: branches[voter] for voter in votes})  # no branch outweighs those who did vote
    cast = sum(among.values())
    needed = max(min(LEAST_VOTES, len(weight)), -(-len(weight) // QUORUM))
    so_far = f"{len(votes)} of {len(weight)} voters have voted"
    if not votes:
        return Stand.OPEN, f"{so_far}, {needed} are needed", None
    median = upper_median((vote.delta, among[voter]) for voter, vote in votes.items())
    said = f"{so_far}; the median of the change in loss is {median / 1e6:+.4f}"
    if 2 * total(weight, (voter for voter, vote in votes.items() if vote.delta >= -BETTER)) > everybody:
        return Stand.WORSE, f"{said}: more than half of all voters find it worse", median
    if len(votes) < min(LEAST_VOTES, len(weight)) or total(weight, votes) * QUORUM < everybody:
        return Stand.OPEN, f"{so_far}, {needed} are needed", median
    worse = total(among, (voter for voter, vote in votes.items() if vote.is_worse))
    if worse * THIRD > cast:
        return Stand.NO_BETTER, f"{said}, but more than a third of the votes find it clearly worse", median
    if median > BETTER:
        return Stand.NO_BETTER, f"{said}, and {BETTER / 1e6:+.3f} is needed", median
    sure = total(weight, favour) * THIRD > everybody
    return (Stand.SURE if sure else Stand.GOOD), said, median


def usual_of(seen: Iterable[Tally], previous: str) -> float:
    """The rate of wrong answers that a node knows from what a candidate is to replace."""
    before = next((one for one in seen if (one.candidate.adapter if one.candidate else "") == previous), None)
    return usual_rate(0, 0) if before is None else usual_rate(before.right, before.wrong)


def _revoked(
    words: Words, founders: frozenset[PeerId], branches: Mapping[PeerId, PeerId], weight: Mapping[PeerId, int]
) -> dict[str, str]:
    """Adapters that a third of all voters, or a person at a founder's device, has revoked."""
    by: defaultdict[str, dict[PeerId, Revocation]] = defaultdict(dict)
    for voter in branches:
        said = words.revocations.get(voter)
        for revocation in said.revoked if said is not None else ():
            by[revocation.adapter][voter] = revocation
    everybody = sum(weight.values())
    out = {}
    for adapter, revokers in sorted(by.items()):
        owner = next((r for peer, r in revokers.items() if peer in founders and r.ground == PERSON), None)
        if owner is not None:
            out[adapter] = f"the network's owner took it back: {owner.why}"
        elif len(revokers) >= min(2, len(weight)) and total(weight, revokers) * THIRD >= everybody:
            reasons = Counter(revocation.why for revocation in revokers.values())
            most = min(reasons, key=lambda why: (-reasons[why], why))
            out[adapter] = f"{len(revokers)} of {len(weight)} voters revoked it, most of them because {most}"
    return out
