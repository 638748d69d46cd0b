"""Which adapter this node answers with: judged by members, rolled out in steps, taken back when it is worse.

The decisions are those of `protocols/rollout`; this service brings it what is said, and carries out what it orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

import trio

from meshnode.core.errors import Declined
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes, Watch
from meshnode.services.port import Comparison, Judge, Notices, Releases
from meshnode.services.rollout.electorate import KINDS, Electorate
from meshnode.state import rollout as state
from meshnode.state.port import Records
from protocols.codec import encode
from protocols.errors import MeshError
from protocols.ids import Cid, PeerId, short
from protocols.membership.messages import FORBIDDEN, TRAIN
from protocols.rollout import events
from protocols.rollout.count import Count, People, Words, count
from protocols.rollout.machine import Rollout
from protocols.rollout.messages import MAX_LOSS, Candidate, Content, Version, Vote
from protocols.rollout.skew import Served, foreign
from protocols.rollout.state import Phase, Release

GATHER_S: Final = 0.2  # after news, for more of them: a count looks at everything that was said

_log = get_logger("rollout")


class NoJudge:
    """`Judge` of services/port.py for a node that can't judge: it has no lesson, or nothing to compute with."""

    def __init__(self) -> None:
        self.changes = Changes()
        self.suite = ""

    async def compare(self, candidate: Candidate, seed: int) -> Comparison:
        raise Declined("no-judge", "this node has no trainer to judge adapters with")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    us: PeerId
    pace: events.Pace = events.Pace()


class RolloutService:
    """`ReleasedAdapter` of services/port.py, and what people may say about it."""

    name = "rollout"

    def __init__(
        self,
        notices: Notices,
        electorate: Electorate,
        releases: Releases,
        judge: Judge,
        records: Records,
        health: Health,
        settings: RolloutSettings,
    ) -> None:
        """Raises DiskError when what was decided before can't be read."""
        self._notices = notices
        self._electorate = electorate
        self._releases = releases
        self._judge = judge
        self._records = records
        self._health = health
        self._us = settings.us
        self._machine = Rollout(settings.us, settings.pace, state.remembered(records))
        self._served: Served | None = None
        self._heard: tuple[Words, People] | None = None
        self._counted = Count(of={}, weight={}, revoked={}, present=frozenset())
        self._to_judge, self._judging = trio.open_memory_channel[events.Judge](1)
        self._woken = Changes()
        self.changes = Changes()

    # ------------------------------------------------------------ what is used

    def current(self, base: Cid) -> Cid | None:
        """See `ReleasedAdapter`."""
        used = self._machine.current
        return Cid(used.adapter) if used is not None and used.base == base else None

    @property
    def using(self) -> Candidate | None:
        """The adapter that questions of this node are answered with; None: the model alone."""
        return self._machine.current

    @property
    def head(self) -> Candidate | None:
        """What a new candidate has to build on; None: the model alone."""
        return self._machine.head

    def kept(self, base: Cid) -> Sequence[Cid]:
        """See `ReleasedAdapter`."""
        used = self.current(base)
        others = sorted(self._machine.kept - {used}) if self._served is not None and self._served.base == base else []
        return [*([used] if used is not None else []), *map(Cid, others)]

    def releases(self) -> tuple[Release, ...]:
        """Every candidate that is known here, the newest first."""
        return self._machine.releases()

    @property
    def may_vote(self) -> bool:
        """Whether this node's word counts where adapters are judged."""
        return self._machine.may_vote

    def voters(self) -> int:
        """Members with a vote that are there, or whose votes are."""
        return len(self._counted.weight)

    def answered(self, adapter: str, *, wrong: bool = False) -> None:
        """A question of this node was answered with this adapter (empty: none); wrong: it failed."""
        self._handle(events.Answered(adapter, wrong))

    def corrected(self, adapter: str) -> None:
        """A person called an answer wrong that was given with this adapter."""
        self._handle(events.Corrected(adapter))

    # ------------------------------------------------------------ what people do

    def propose(
        self, adapter: Cid, base: Cid, frame: Cid, *, round: int = 0, parents: tuple[str, ...] = ()
    ) -> Candidate:
        """Propose an adapter in place of what is released; members judge it, and it is rolled out if it is better.

        Args:
          base, frame: what its manifest names.
          round, parents: of learning, and the deltas that were mixed into it.

        Raises Declined `forbidden`, `not-ready`, `wrong-base`, `revoked`.
        """
        if not self._electorate.may_propose(self._us):
            raise Declined(
                FORBIDDEN,
                f"This node may not propose adapters: its certificate lacks the role {TRAIN}. Let it join again with "
                f"a ticket that gives it (meshnode invite --roles serve,{TRAIN}).",
            )
        served, head = self._served, self._machine.head
        if served is None:
            raise Declined("not-ready", f"An adapter is proposed for what is served: {self._releases.why_none}.")
        if (why_gone := self._machine.gone.get(adapter)) is not None:
            raise Declined("revoked", f"The adapter {adapter} was revoked and can't be proposed again: {why_gone}.")
        if head is not None and head.adapter == adapter:
            raise Declined("released", f"The adapter {adapter} is released already, as {head.version}.")
        version = Version.parse(head.version if head is not None else served.version)
        candidate = Candidate(
            adapter=adapter,
            base=base,
            frame=frame,
            suite=served.suite,
            version=str(version._replace(adapter=version.adapter + 1)),
            previous=head.adapter if head is not None else "",
            round=round,
            parents=parents,
        )
        if (why := foreign(candidate, served)) is not None:
            raise Declined("wrong-base", f"The adapter {adapter} can't be proposed: {why}.")
        self._handle(events.Proposed(candidate))
        return candidate

    def proposed(self, frame: Cid) -> bool:
        """Whether an adapter of this lineage is proposed and was not refused."""
        gone = (Phase.REFUSED, Phase.REVOKED)
        return any(one.counted.candidate.frame == frame and one.phase not in gone for one in self.releases())

    def roll_back(self, wanted: str, why: str) -> Release:
        """This node goes back from an adapter, and says so with its vote, if it has one.

        wanted: its version or CID; empty: what is used.

        Raises Declined `no-release`.
        """
        release = self.find(wanted)
        adapter = release.counted.candidate.adapter
        self._handle(events.RolledBack(adapter, why))
        return next(one for one in self.releases() if one.id == release.id)

    def find(self, wanted: str) -> Release:
        """The candidate with this version, CID of its adapter or id; empty: what is used.

        Raises Declined `no-release`.
        """
        every = self.releases()
        if not wanted:
            found = [one for one in every if one.in_use]
            if not found:
                raise Declined("no-release", "No adapter is used here; the model alone answers.")
            return found[0]
        found = [
            one for one in every if wanted in (one.id, one.counted.candidate.adapter, one.counted.candidate.version)
        ]
        if not found:
            names = ", ".join(one.counted.candidate.version for one in every) or "none"
            raise Declined("no-release", f"No release {wanted[:80]!r} is known here; there are: {names}.")
        if len({one.counted.candidate.adapter for one in found}) > 1:
            cids = ", ".join(one.counted.candidate.adapter for one in found)
            raise Declined("no-release", f"Several releases are called {wanted[:80]}; name one by its CID: {cids}.")
        return found[0]

    # ------------------------------------------------------------ running

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow what is said until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, self._electorate.watch())
            nursery.start_soon(self._watch, Watch(self._releases.changes, self._judge.changes))
            nursery.start_soon(self._judge_all)
            self._look()
            task_status.started()
            while True:
                version = self._woken.version
                deadline = self._machine.deadline
                with trio.move_on_at(deadline):
                    await self._woken.wait(version)
                    await trio.sleep(GATHER_S)
                self._look()
                if trio.current_time() >= self._machine.deadline:
                    self._handle(events.Expired())

    async def _watch(self, watch: Watch) -> None:
        while True:
            await watch.next()
            self._woken.notify()

    def _look(self) -> None:
        """Bring the machine what has changed."""
        release = self._releases.current
        served = None
        if release is not None:
            served = Served(base=release.cid, version=release.manifest.version, suite=self._judge.suite)
        if served != self._served:
            self._served = served
            self._handle(events.Serving(served))
        words = self._electorate.words()
        people = self._electorate.people(words)
        if self._heard != (words, people):
            self._heard = words, people
            self._counted = count(words, people)
            self._handle(events.Heard(self._counted))

    def _handle(self, event: events.Event) -> None:
        before = self._machine.current
        effects = self._machine.handle(event, trio.current_time())
        for effect in effects:
            match effect:
                case events.Remember(memory=memory):
                    state.remember(self._records, memory)
                case events.Say(content=content):
                    self._say(content)
                case events.Judge():
                    self._to_judge.send_nowait(effect)
                case events.Use(candidate=used):
                    self._use(before, used)
        if effects or isinstance(event, events.Heard):
            self._report()
            self.changes.notify()
        self._woken.notify()

    def _say(self, content: Content) -> None:
        kind = KINDS[type(content)]
        try:
            self._notices.give(kind, encode(content))
        except Declined as error:  # the role was taken away meanwhile
            _log.warning("words.not_given", kind=kind, reason=str(error))

    def _use(self, before: Candidate | None, used: Candidate | None) -> None:
        _log.info("adapter.used", version=_named(used), before=_named(before))
        if before is None:
            return
        release = next((one for one in self.releases() if one.counted.candidate == before), None)
        if release is not None and release.phase not in (Phase.RELEASED, Phase.REPLACED):
            self._health.set(
                "adapter-rolled-back",
                version=before.version,
                adapter=short(before.adapter),
                reason=release.why,
                instead="The model alone" if used is None else used.version,
            )

    def _report(self) -> None:
        held = {one.counted.candidate.version: one.why for one in self.releases() if one.phase is Phase.HELD}
        self._health.clear("adapter-held")
        for version, why in held.items():
            self._health.set("adapter-held", version=version, reason=why)

    async def _judge_all(self) -> None:
        async for asked in self._judging:
            try:
                found = await self._judge.compare(asked.candidate, asked.seed)
            except MeshError as error:
                _log.warning("candidate.not_judged", version=asked.candidate.version, reason=str(error))
                self._health.set("adapter-not-judged", version=asked.candidate.version, reason=str(error))
                self._handle(events.NotJudged(asked.id))
            else:
                self._health.clear("adapter-not-judged", version=asked.candidate.version)
                self._handle(events.Judged(_vote(asked.id, found)))


def _vote(candidate: Cid, found: Comparison) -> Vote:
    return Vote(
        candidate=candidate,
        samples=found.samples,
        loss_new=_micro(found.loss_new),
        loss_old=_micro(found.loss_old),
        ci95=_micro(found.ci95),
        hardware="".join(c for c in found.hardware if c.isprintable())[:64],
    )


def _micro(nats: float) -> int:
    """A loss that is no number counts as the worst."""
    return round(min(max(nats, 0.0), MAX_LOSS / 1e6) * 1e6) if nats < inf else MAX_LOSS


def _named(candidate: Candidate | None) -> str:
    return "the model alone" if candidate is None else candidate.version
