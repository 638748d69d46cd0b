"""How far each roll-out has come at one node: steps, whose turn it is, and what was seen on the way."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import inf

from protocols.ids import Cid, PeerId
from protocols.rollout.count import Counted, Stand, usual_of
from protocols.rollout.events import Pace
from protocols.rollout.memory import MAX_KNOWN, MAX_OPINIONS, RELEASED, SHARES, Known
from protocols.rollout.messages import MAX_TALLIES, Candidate, Tally, candidate_id, draw
from protocols.rollout.sprt import are_stopped, is_stopped


@dataclass(slots=True)
class _Clock:
    """When a candidate was seen first, and since when it may take its next step (None: it may not)."""

    seen: float
    since: float | None = None
    held: bool = False


class Progress:
    """The candidates whose roll-out has begun here."""

    def __init__(self, us: PeerId, pace: Pace, known: Collection[Known]) -> None:
        self._us = us
        self._pace = pace
        self.known = {candidate_id(one.candidate): one for one in known}
        self._clocks: dict[Cid, _Clock] = {}
        self._present = frozenset({us})
        self._ranks: dict[Cid, dict[PeerId, int]] = {}

    def step(self, cid: Cid) -> int:
        """0 to RELEASED."""
        return self.known[cid].step if cid in self.known else 0

    def is_released(self, cid: Cid) -> bool:
        """Whether the roll-out is over, for this node."""
        return self.step(cid) == RELEASED

    def under_way(self) -> dict[Cid, Candidate]:
        """Candidates that some nodes use, and others not yet."""
        return {cid: known.candidate for cid, known in self.known.items() if 0 < known.step < RELEASED}

    def replaces_a_release(self, candidate: Candidate) -> bool:
        """Whether it builds on something that is released here, or on the model alone."""
        return not candidate.previous or any(
            known.step == RELEASED and known.candidate.adapter == candidate.previous for known in self.known.values()
        )

    # ------------------------------------------------------------ going on

    def advance(
        self, accepted: Mapping[Cid, Counted], path: Collection[Cid], present: frozenset[PeerId], now: float
    ) -> float:
        """Take the steps for which it is time; begin anew what is not accepted any more. When to look again.

        path: the chosen ones of those that are accepted; the others wait.
        """
        if self._present != present | {self._us}:
            self._present, self._ranks = present | {self._us}, {}
        for cid, known in self.known.items():
            if cid not in accepted and known.step < RELEASED:
                self.known[cid] = replace(known, step=0, in_use=False)
        deadline = inf
        for cid, counted in accepted.items():
            if not self.is_released(cid):
                deadline = min(deadline, self._advance(cid, counted, chosen=cid in path, now=now))
            self._take_turn(cid)
        return deadline

    def notice(self, cids: Collection[Cid], now: float) -> None:
        """These are proposed, or were; their votes are collected from now on. Others are forgotten."""
        self._clocks = {cid: self._clocks.get(cid) or _Clock(now) for cid in cids}

    def _advance(self, cid: Cid, counted: Counted, *, chosen: bool, now: float) -> float:
        clock = self._clocks[cid]
        held = self.held(cid, counted)
        if held != clock.held:
            clock.held, clock.since = held, None
        wait_s = self._wait_s(cid, counted, clock, chosen=chosen)
        if wait_s is None:
            clock.since = None
            return inf
        if clock.since is None:
            clock.since = now
            wait_s = self._wait_s(cid, counted, clock, chosen=chosen) or 0.0
        if now < clock.since + wait_s:
            return clock.since + wait_s
        if counted.most_released:
            self._take_step(cid, counted.candidate, RELEASED)
        elif held:
            self.known[cid] = replace(self.known[cid], opinions=min(self.known[cid].opinions + 1, MAX_OPINIONS))
        else:
            self._take_step(cid, counted.candidate, self.step(cid) + 1)
        clock.since = now
        wait_s = None if self.is_released(cid) else self._wait_s(cid, counted, clock, chosen=chosen)
        return inf if wait_s is None else now + wait_s

    def _wait_s(self, cid: Cid, counted: Counted, clock: _Clock, *, chosen: bool) -> float | None:
        """How long the present step lasts before the next one; None: what the next one needs is not there."""
        since = clock.seen if clock.since is None else clock.since
        collect_s = max(clock.seen + self._pace.collect_s - since, 0.0)
        if counted.most_released:
            return collect_s
        if not chosen or not self.replaces_a_release(counted.candidate):
            return None
        if self.step(cid) == 0:
            return collect_s
        return self._pace.soak_s if clock.held or counted.stand is Stand.SURE else None

    def held(self, cid: Cid, counted: Counted) -> bool:
        """Whether those whose turn it is see too many wrong answers."""
        known = self.known.get(cid)
        if known is None or not 0 < known.step < RELEASED:
            return False
        first = self._first(known)
        ranks = self._ranks_of(cid)
        return are_stopped([seen for peer, seen in counted.seen.items() if ranks.get(peer, first) < first])

    def _take_step(self, cid: Cid, candidate: Candidate, step: int) -> None:
        known = self.known.pop(cid, None) or Known(candidate=candidate, step=step)
        self.known[cid] = replace(known, step=step)  # the one that moved last stands last
        while len(self.known) > MAX_KNOWN:
            del self.known[min(self.known, key=lambda one: self.known[one].step > 0)]  # the oldest that was given up

    def _take_turn(self, cid: Cid) -> None:
        """Begin to use it, if this node is among the first so many; whoever has begun goes on."""
        known = self.known.get(cid)
        if known is None or known.in_use or known.left or known.step == 0:
            return
        if known.step == RELEASED or self._ranks_of(cid)[self._us] < self._first(known):
            self.known[cid] = replace(known, in_use=True)

    def _first(self, known: Known) -> int:
        """How many nodes use it: the share of its step, and for each further opinion as many as the first ones."""
        nodes = len(self._present)
        return -(-nodes * SHARES[known.step] // 1000) + known.opinions * -(-nodes * SHARES[1] // 1000)

    def _ranks_of(self, cid: Cid) -> dict[PeerId, int]:
        """How many of the nodes that are there come before each of them."""
        if cid not in self._ranks:
            order = sorted(self._present, key=lambda one: draw(cid, one))
            self._ranks[cid] = {one: rank for rank, one in enumerate(order)}
        return self._ranks[cid]

    # ------------------------------------------------------------ what is seen of them

    def note(self, adapter: str, right: int, wrong: int) -> None:
        """So many more answers were given with it; -1 right: one of them was wrong after all."""
        for cid, known in self.known.items():
            if known.candidate.adapter == adapter:
                self.known[cid] = replace(known, right=max(known.right + right, 0), wrong=known.wrong + wrong)

    def leave(self, adapter: str) -> None:
        """This node does not use it any more, whatever the others do."""
        for cid, known in self.known.items():
            if known.candidate.adapter == adapter:
                self.known[cid] = replace(known, in_use=False, left=True)

    def failing(self, plain: Tally) -> list[tuple[Known, float]]:
        """Those that are wrong too often here, with the usual rate. `plain`: what was seen of the model alone."""
        found = []
        for known in self.known.values():
            if known.left or not known.wrong:
                continue
            seen = [*self.tallies(known.candidate.base), plain]
            usual = usual_of(seen, known.candidate.previous)
            if is_stopped(known.right, known.wrong, usual):
                found.append((known, usual))
        return found

    def tallies(self, base: str) -> list[Tally]:
        """What was seen of adapters for a model release: those under way, then what is in use, the newest first."""
        of_base = [known for known in reversed(self.known.values()) if known.candidate.base == base]
        of_base.sort(key=lambda known: (0 < known.step < RELEASED, known.in_use, known.step), reverse=True)
        return [
            Tally(
                candidate=known.candidate,
                released=known.step == RELEASED and not known.left,
                right=known.right,
                wrong=known.wrong,
            )
            for known in of_base[: MAX_TALLIES - 1]
        ]
