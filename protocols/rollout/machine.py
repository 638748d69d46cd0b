"""One node's part in every roll-out, as a state machine without I/O.

No clock, no randomness, no await: time comes in as `now` (seconds, monotonic), orders go out as effects, a wish to be
woken is `deadline`. What everybody has said comes in as a `Count`; whoever has heard the same decides the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import inf

from protocols.ids import Cid, PeerId
from protocols.rollout.count import Count, Counted, Stand
from protocols.rollout.events import (
    Answered,
    Corrected,
    Effect,
    Event,
    Expired,
    Heard,
    Judge,
    Judged,
    NotJudged,
    Pace,
    Proposed,
    Remember,
    RolledBack,
    Say,
    Serving,
    Use,
)
from protocols.rollout.fork import chosen_path
from protocols.rollout.memory import MAX_GONE, SHARES, Gone, Memory
from protocols.rollout.messages import (
    LIVE_ERRORS,
    MAX_CANDIDATES,
    MAX_REVOCATIONS,
    MAX_VOTES,
    PERSON,
    SUITE,
    Ballots,
    Candidate,
    Candidates,
    Revocation,
    Revocations,
    Tallies,
    Tally,
    candidate_id,
    suite_seed,
)
from protocols.rollout.progress import Progress
from protocols.rollout.skew import Served, behind, foreign
from protocols.rollout.state import Phase, Release


class Rollout:
    """Which adapter this node uses, and what it says of others."""

    def __init__(self, us: PeerId, pace: Pace, memory: Memory | None = None) -> None:
        """`memory`: what was remembered when the node ran last."""
        memory = memory or Memory()
        self._us = us
        self._pace = pace
        self._progress = Progress(us, pace, memory.known)
        self._served: Served | None = None
        self._count = Count(of={}, weight={}, revoked={}, present=frozenset())
        self._gone = {gone.adapter: gone.why for gone in memory.gone}
        self._votes = memory.votes
        self._revocations = memory.revocations
        self._proposed = memory.proposed
        self._plain_base, self._plain = memory.base, Tally(right=memory.right, wrong=memory.wrong)
        self._remembered = memory
        self._judging: Cid | None = None
        self._not_before: dict[Cid, float] = {}  # candidates that could not be judged
        self._using: Candidate | None = None
        self._head: Candidate | None = None
        self._path: tuple[Cid, ...] = ()
        self._told = Tallies(base="", seen=())
        self._tell_at = -inf
        self.deadline = inf

    @property
    def current(self) -> Candidate | None:
        """What questions of this node use; None: the model alone."""
        return self._using

    @property
    def head(self) -> Candidate | None:
        """The newest that is released here: what a new candidate has to build on; None: the model alone."""
        return self._head

    @property
    def may_vote(self) -> bool:
        """Whether this node is among the voters."""
        return self._us in self._count.weight

    @property
    def gone(self) -> Mapping[str, str]:
        """Adapters that must never be served again, and why."""
        return self._gone

    @property
    def kept(self) -> frozenset[str]:
        """Adapters that stay loaded: what is in use, and both sides of every roll-out."""
        under_way = [one for cid, one in self._progress.under_way().items() if cid in self._path]
        both = {adapter for one in under_way for adapter in (one.adapter, one.previous)}
        both.add(self._using.adapter if self._using is not None else "")
        return frozenset(both - {""})

    def handle(self, event: Event, now: float) -> tuple[Effect, ...]:
        """What is to be done about an event."""
        effects: list[Effect] = []
        match event:
            case Serving(served=served):
                self._served = served
                if served is not None and served.base != self._plain_base:
                    self._plain_base, self._plain = served.base, Tally()
            case Heard(count=count):
                self._count = count
            case Judged(vote=vote):
                self._judging = None
                self._votes = (vote, *(v for v in self._votes if v.candidate != vote.candidate))[:MAX_VOTES]
                effects.append(Say(Ballots(votes=self._votes)))
            case NotJudged(candidate=cid):
                self._judging = None
                self._not_before[cid] = now + self._pace.retry_s
            case Answered() | Corrected():
                self._note(event)
                if not self._progress.failing(self._plain):
                    self.deadline = min(self.deadline, max(self._tell_at, now))
                    return ()
            case Proposed(candidate=candidate):
                others = tuple(one for one in self._proposed if one != candidate)
                self._proposed = (candidate, *others)[:MAX_CANDIDATES]
                effects.append(Say(Candidates(proposed=self._proposed)))
            case RolledBack(adapter=adapter, why=why):
                self._progress.leave(adapter)
                effects += self._revoke([Revocation(adapter=adapter, ground=PERSON, why=why)])
            case Expired():
                pass
        effects += self._settle(now)
        memory = self.memory()
        if memory != self._remembered:
            self._remembered = memory
            effects.append(Remember(memory))
        return tuple(effects)

    def _note(self, event: Answered | Corrected) -> None:
        right, wrong = (-1, 1) if isinstance(event, Corrected) else (int(not event.wrong), int(event.wrong))
        if event.adapter:
            self._progress.note(event.adapter, right, wrong)
        else:
            self._plain = Tally(right=max(self._plain.right + right, 0), wrong=self._plain.wrong + wrong)

    # ------------------------------------------------------------ what follows from all that is known

    def _settle(self, now: float) -> list[Effect]:
        for adapter, why in self._count.revoked.items():
            self._gone.setdefault(adapter, why)
        self._gone = dict(list(self._gone.items())[-MAX_GONE:])
        effects = self._revoke([*self._go_back(), *self._found_worse()])
        usable = self._usable()
        self._progress.notice(usable, now)
        accepted = {
            cid: counted
            for cid, counted in usable.items()
            if self._progress.is_released(cid) or counted.stand in (Stand.GOOD, Stand.SURE)
        }
        self._path = chosen_path(accepted, self._count.weight)
        self.deadline = self._progress.advance(accepted, self._path, self._count.present, now)
        self._head = self._newest({cid: c for cid, c in accepted.items() if self._progress.is_released(cid)})
        use = self._newest({cid: c for cid, c in accepted.items() if self._uses(cid)})
        if use != self._using:
            self._using = use
            effects.append(Use(use))
        return [*effects, *self._judge_next(usable, now), *self._tidy_proposals(), *self._report(now)]

    def _newest(self, among: Mapping[Cid, Counted]) -> Candidate | None:
        path = chosen_path(among, self._count.weight)
        return among[path[-1]].candidate if path else None

    def _uses(self, cid: Cid) -> bool:
        known = self._progress.known.get(cid)
        return known is not None and known.in_use

    def _every(self) -> dict[Cid, Counted]:
        """All that is said or known of candidates."""
        known = {cid: Counted.unheard(known.candidate) for cid, known in self._progress.known.items()}
        return {**known, **self._count.of}

    def _usable(self) -> dict[Cid, Counted]:
        """Candidates for what is served that nobody has revoked, nor what they build on."""
        return {
            cid: counted
            for cid, counted in self._every().items()
            if counted.candidate.adapter not in self._gone
            and counted.candidate.previous not in self._gone
            and self._why_foreign(cid, counted.candidate) is None
        }

    def _why_foreign(self, cid: Cid, candidate: Candidate) -> str | None:
        """A new lesson does not take back what an old one has taught."""
        if self._served is None:
            return "the network serves no model, or this node does not know which"
        if self._progress.is_released(cid) and candidate.base == self._served.base:
            return None
        return foreign(candidate, self._served)

    # ------------------------------------------------------------ going back

    def _go_back(self) -> list[Revocation]:
        """From what fails too often here."""
        found = []
        for known, usual in self._progress.failing(self._plain):
            self._progress.leave(known.candidate.adapter)
            found.append(
                Revocation(
                    adapter=known.candidate.adapter,
                    ground=LIVE_ERRORS,
                    why="too many of its answers were wrong",
                    right=known.right,
                    wrong=known.wrong,
                    usual=round(usual * 1e6),
                )
            )
        return found

    def _found_worse(self) -> list[Revocation]:
        """Candidates that our own vote finds clearly worse, or more than half of all voters."""
        ours = {vote.candidate: vote for vote in self._votes}
        found = []
        for cid, counted in self._count.of.items():
            if counted.stand is Stand.WORSE:
                why = "more than half of all voters find it worse"
            elif cid in ours and ours[cid].is_worse:
                why = "it is clearly worse on the held-out samples"
            else:
                continue
            found.append(Revocation(adapter=counted.candidate.adapter, ground=SUITE, why=why))
        return found

    def _revoke(self, found: Iterable[Revocation]) -> list[Effect]:
        """Say it, if this node may vote and has not said it."""
        said = {revocation.adapter for revocation in self._revocations}
        new = {revocation.adapter: revocation for revocation in found if revocation.adapter not in said}
        if not new or not self.may_vote:
            return []
        self._revocations = (*new.values(), *self._revocations)[:MAX_REVOCATIONS]
        return [Say(Revocations(revoked=self._revocations))]

    # ------------------------------------------------------------ saying

    def _judge_next(self, usable: Mapping[Cid, Counted], now: float) -> list[Effect]:
        """One candidate at a time; the proposer goes first of whom we have judged least."""
        if self._judging is not None or not self.may_vote:
            return []
        voted = {vote.candidate for vote in self._votes}
        judged = Counter(peer for cid, counted in usable.items() if cid in voted for peer in counted.proposers)
        worth = {cid: usable[cid] for cid in self._worth_judging(usable) if cid not in voted}
        self._not_before = {cid: at for cid, at in self._not_before.items() if cid in worth and at > now}
        self.deadline = min(self.deadline, *self._not_before.values(), inf)
        ready = worth.keys() - self._not_before.keys()
        if not ready:
            return []
        cid = min(
            ready,
            key=lambda one: (
                min(judged[proposer] for proposer in worth[one].proposers),
                -worth[one].candidate.round,
                one,
            ),
        )
        self._judging = cid
        return [Judge(cid, worth[cid].candidate, suite_seed(cid, self._us))]

    def _worth_judging(self, usable: Mapping[Cid, Counted]) -> list[Cid]:
        """What would follow on our release, is our release, or has more votes than that and would take its place."""
        voted_for = {cid: c for cid, c in usable.items() if c.favour or self._progress.is_released(cid)}
        rivals = chosen_path(voted_for, self._count.weight)
        return [
            cid
            for cid, counted in usable.items()
            if counted.proposers
            and (
                counted.candidate == self._head
                or behind(counted.candidate, self._head) is None
                or (cid in rivals and self._progress.replaces_a_release(counted.candidate))
            )
        ]

    def _tidy_proposals(self) -> list[Effect]:
        """Take back what was revoked, or overtaken by what is released."""
        head = self._head
        stays = tuple(
            one
            for one in self._proposed
            if one.adapter not in self._gone
            and (head is None or one == head or one.base != head.base or behind(one, head) is None)
        )
        if stays == self._proposed:
            return []
        self._proposed = stays
        return [Say(Candidates(proposed=stays))]

    def _report(self, now: float) -> list[Effect]:
        if self._served is None:
            return []
        seen = self._progress.tallies(self._served.base)
        if self._plain.right + self._plain.wrong:
            seen.append(self._plain)
        report = Tallies(base=self._served.base, seen=tuple(seen))
        if report == self._told or not (seen or self._told.seen):
            return []
        if now < self._tell_at:
            self.deadline = min(self.deadline, self._tell_at)
            return []
        self._told, self._tell_at = report, now + self._pace.report_s
        return [Say(report)]

    def memory(self) -> Memory:
        """What must outlive a restart."""
        return Memory(
            known=tuple(self._progress.known.values()),
            gone=tuple(Gone(adapter=adapter, why=why) for adapter, why in self._gone.items()),
            votes=self._votes,
            revocations=self._revocations,
            proposed=self._proposed,
            base=self._plain_base,
            right=self._plain.right,
            wrong=self._plain.wrong,
        )

    # ------------------------------------------------------------ for people

    def releases(self) -> tuple[Release, ...]:
        """Every candidate that is known, the newest first, with a clause about it."""
        found = [self._release(cid, counted) for cid, counted in self._every().items()]
        return tuple(sorted(found, key=lambda one: (-one.counted.counter, one.id)))

    def _release(self, cid: Cid, counted: Counted) -> Release:
        phase, why = self._phase(cid, counted)
        known = self._progress.known.get(cid)
        return Release(
            id=cid,
            counted=counted,
            phase=phase,
            why=why,
            share=SHARES[self._progress.step(cid)],
            in_use=self._using is not None and candidate_id(self._using) == cid,
            right=known.right if known is not None else 0,
            wrong=known.wrong if known is not None else 0,
        )

    def _phase(self, cid: Cid, counted: Counted) -> tuple[Phase, str]:
        candidate, stand = counted.candidate, counted.stand
        known = self._progress.known.get(cid)
        if candidate.adapter in self._gone:
            return Phase.REVOKED, self._gone[candidate.adapter]
        if candidate.previous in self._gone:
            return Phase.REVOKED, f"it builds on an adapter that was revoked: {self._gone[candidate.previous]}"
        if (why := self._why_foreign(cid, candidate)) is not None:
            return Phase.FOREIGN, why
        if known is not None and known.left:
            return Phase.LEFT, "this node has gone back from it: too many answers were wrong, or a person said so"
        if self._progress.is_released(cid):
            if candidate == self._head:
                return Phase.RELEASED, "every node may use it"
            return Phase.REPLACED, "another release has taken its place"
        if stand in (Stand.NO_BETTER, Stand.WORSE):
            return Phase.REFUSED, counted.why
        if stand is Stand.OPEN:
            return Phase.OPEN, behind(candidate, self._head) or counted.why
        if self._progress.held(cid, counted):
            return Phase.HELD, "the nodes that use it see too many wrong answers, so others try it before it goes on"
        if cid not in self._path:
            return Phase.OVERTAKEN, "another candidate has more votes"
        if self._progress.step(cid) and stand is Stand.GOOD:
            return Phase.ROLLING, f"{counted.why}; to go on, more than a third of all voters have to find it better"
        return Phase.ROLLING, counted.why
