"""One node's rounds: train, publish a delta, take those of its partners, mix, again. See SPEC.md.

Rule 1: every state and every transition is in TRANSITIONS, nowhere else.
Rule 2: no clock, no I/O, no vectors. Time comes in as `now` (monotonic seconds), a wish to be woken goes out as
`deadline`, orders go out as effects; the node does them and says so with the next event.

Nobody waits for everybody: a partner that is late for `wait_s` is passed over, and its last delta taken instead if it
is not too old. Rounds are numbered, and who fell behind goes on with the round that most have reached.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from protocols.delta.messages import MAX_EXCHANGE, DeltaRecord, Position
from protocols.errors import LocalProtocolError
from protocols.ids import PeerId
from protocols.round.collect import Partners, Updates, behind, newest_whole
from protocols.round.events import (
    Arrived,
    Begin,
    Effect,
    Event,
    Expired,
    Fetched,
    Input,
    Left,
    Mix,
    Mixed,
    Publish,
    Published,
    Refused,
    Stop,
    Train,
    Trained,
)
from protocols.round.schedule import Mode, Partner, Readings, cycle_of, order_of

MAX_BEHIND: Final = 4  # rounds: whoever is silent for longer takes no part, and comes back as a newcomer
ADOPTED: Final = 5  # newest adapters from which a newcomer makes its own
FETCH_S: Final = 30.0  # for a late partner's older delta, or a newcomer's start


class State(Enum):
    RESTING = "resting"  # takes no part
    ADOPTING = "adopting"  # a newcomer: fetches what others have learnt
    GATHERING = "gathering"  # the first of all, or far ahead: waits for others
    TRAINING = "training"
    PUBLISHING = "publishing"  # packs the adapter and announces it
    EXCHANGING = "exchanging"  # waits for the deltas of this exchange's partners
    MIXING = "mixing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How the rounds of a lineage go; the same on all its nodes."""

    lineage: str  # frame and base: what the order of partners is drawn from
    mode: Mode = Mode.PAIRWISE
    mixes: int = 0  # exchanges a round; 0: a whole cycle, after which all have the mean
    group: int = 8  # most members of a group
    wait_s: float = 60.0  # for a late partner
    least: int = 2  # participants that the first of all waits for, at most `wait_s`


_OTHERS: Final = (Arrived, Left, Fetched, Refused)  # come at any time; in most states they are only noted
_GOES_ON: Final = (State.EXCHANGING, State.MIXING, State.PUBLISHING, State.GATHERING, State.TRAINING, State.ADOPTING)
TRANSITIONS: Final[Mapping[tuple[State, type], tuple[State, ...]]] = {
    (State.RESTING, Begin): (State.ADOPTING, State.PUBLISHING),
    (State.ADOPTING, Arrived): (State.ADOPTING,),
    (State.ADOPTING, Left): (State.ADOPTING, State.MIXING, State.PUBLISHING),
    (State.ADOPTING, Fetched): (State.ADOPTING, State.MIXING),
    (State.ADOPTING, Refused): (State.ADOPTING, State.MIXING, State.PUBLISHING),
    (State.ADOPTING, Expired): (State.MIXING, State.PUBLISHING),
    (State.GATHERING, Arrived): (State.GATHERING, State.TRAINING),
    (State.GATHERING, Left): (State.GATHERING, State.TRAINING),  # it was the last to be waited for
    (State.GATHERING, Expired): (State.TRAINING,),
    (State.TRAINING, Trained): (State.PUBLISHING,),
    (State.PUBLISHING, Published): _GOES_ON,
    (State.EXCHANGING, Arrived): (State.EXCHANGING,),
    (State.EXCHANGING, Left): _GOES_ON,
    (State.EXCHANGING, Fetched): (State.EXCHANGING, State.MIXING),
    (State.EXCHANGING, Refused): _GOES_ON,
    (State.EXCHANGING, Expired): _GOES_ON,
    (State.MIXING, Mixed): (State.PUBLISHING, State.GATHERING, State.TRAINING, State.ADOPTING),
    **{
        (state, event): (state,)
        for state in (State.RESTING, State.GATHERING, State.TRAINING, State.PUBLISHING, State.MIXING)
        for event in _OTHERS
        if (state, event) not in ((State.GATHERING, Arrived), (State.GATHERING, Left))
    },
    **{(state, Stop): (State.RESTING,) for state in State},
}


class RoundMachine:
    """The rounds of one node in one lineage."""

    def __init__(self, us: PeerId, rules: Rules, sites: Callable[[], Collection[Collection[str]]] = tuple) -> None:
        """
        Args:
          sites: who is on one local network now (`schedule.sites_of`); HIERARCHICAL asks.
        """
        self.state = State.RESTING
        self.deadline: float | None = None
        self.position = Position(0, 0)
        self._us = us
        self._rules = rules
        self._sites = sites
        self._records: dict[PeerId, DeltaRecord] = {}  # the newest one of each other participant
        self._mixed: tuple[Input, ...] = ()  # since we last published
        self._starting = False  # until the first training
        self._exchanges = 0  # of this round, as planned at its first
        self._late = False  # the deadline of this exchange has passed once
        self._partners: Partners | Updates = Updates() if rules.mode is Mode.BROADCAST else Partners()

    @property
    def round(self) -> int:
        """The round that half of all have reached: no minority can move it. Our own one when nobody else is known."""
        rounds = sorted(record.made.round for record in self._records.values())
        if self.state is not State.RESTING or not rounds:
            rounds = sorted((*rounds, self.position.round))
        return rounds[len(rounds) // 2]

    @property
    def participants(self) -> tuple[PeerId, ...]:
        """Whom we count on, ourselves included, sorted."""
        near = (p for p, r in self._records.items() if abs(r.made.round - self.position.round) <= MAX_BEHIND)
        return tuple(sorted((self._us, *near)))

    @property
    def behind(self) -> frozenset[PeerId]:
        """Participants that have missed a round already."""
        return frozenset(p for p in self.participants if p != self._us and behind(self._records[p], self.position))

    def expects(self, event: Event) -> bool:
        """Whether this state allows the event."""
        return (self.state, type(event)) in TRANSITIONS

    def handle(self, event: Event, now: float) -> tuple[Effect, ...]:
        """Take one event, return what to do, in order.

        Raises:
          LocalProtocolError: this state does not allow the event; nothing has changed.
        """
        if not self.expects(event):
            raise LocalProtocolError(f"a round does not expect {type(event).__name__} while {self.state.value}")
        following = TRANSITIONS[self.state, type(event)]
        effects = self._note(event)
        match event:
            case Begin(after):
                effects += self._begin(after, now)
            case Stop():
                self._enter(State.RESTING)
                self._partners.clear()
            case Trained():
                effects += self._publish()
            case Published():
                effects += self._published(now)
            case Mixed():
                effects += self._publish() if self._starting else self._next(now)
            case Expired():
                effects += self._expired(now)
            case _ if self.state is State.GATHERING and self._may_train:
                effects += self._train()
            case _ if self.state in (State.ADOPTING, State.EXCHANGING) and self._partners.done:
                effects += self._mix(now)
        assert self.state in following, f"{type(event).__name__} led to {self.state}"
        return effects

    # ------------------------------------------------------------ what others say

    def _note(self, event: Event) -> tuple[Effect, ...]:
        match event:
            case Arrived(record):
                peer = PeerId(record.peer)
                known = self._records.get(peer)
                if peer == self._us or (known is not None and known.position >= record.position):
                    return ()
                self._records[peer] = record
                return self._partners.arrived(record) if self.state is not State.RESTING else ()
            case Left(peer):
                self._records.pop(peer, None)
                return self._partners.lost(peer, "it has left")
            case Fetched(peer, delta):
                self._partners.fetched(peer, delta)
            case Refused(peer, delta, reason):
                return self._partners.refused(peer, delta, reason)
        return ()

    # ------------------------------------------------------------ start

    def _begin(self, after: int, now: float) -> tuple[Effect, ...]:
        most = self.round if self._records else 0
        self.position = Position(max(after + 1, most), 0)
        self._starting, self._mixed = True, ()
        near = [r for r in self._records.values() if abs(r.made.round - most) <= MAX_BEHIND]
        if near and (most - after > MAX_BEHIND or self._rules.mode is Mode.BROADCAST):
            count = 1 if self._rules.mode is Mode.BROADCAST else ADOPTED
            self._enter(State.ADOPTING, now + FETCH_S)
            return self._partners.adopt(newest_whole(near, count, self._rules.lineage))
        self._partners.since(self.position.round)
        return self._publish()

    def _published(self, now: float) -> tuple[Effect, ...]:
        self._mixed = ()
        if not self._starting:
            return self._exchange(now)
        return self._train_or_wait(now)

    # ------------------------------------------------------------ one round

    @property
    def _may_train(self) -> bool:
        """Whether there are enough others, and we would not run away from them."""
        if self._starting:
            return len(self.participants) >= self._rules.least
        return self.position.round - self.round < MAX_BEHIND

    def _train_or_wait(self, now: float) -> tuple[Effect, ...]:
        if self._may_train:
            return self._train()
        self._enter(State.GATHERING, now + self._rules.wait_s)
        return ()

    def _train(self) -> tuple[Effect, ...]:
        self._starting = False
        self.position = Position(max(self.position.round + 1, self.round), 0)
        self._enter(State.TRAINING)
        return (Train(self.position.round),)

    def _publish(self) -> tuple[Effect, ...]:
        self._enter(State.PUBLISHING)
        return (Publish(self.position, self._mixed),)

    def _exchange(self, now: float) -> tuple[Effect, ...]:
        partners = self._readings()
        self._late = False
        self._enter(State.EXCHANGING, now + self._rules.wait_s)
        near = [self._records[peer] for peer in self.participants if peer != self._us]
        ready = 1 + sum(not behind(record, self.position) for record in near)
        patient = 2 * ready <= len(near) + 1  # when most are behind, it is we who are ahead
        effects = self._partners.begin(self.position, partners, self._records, patient=patient)
        return effects + self._mix(now) if self._partners.done else effects

    def _readings(self) -> tuple[Partner, ...]:
        """Whose deltas this exchange takes. Plans how many exchanges the round has."""
        names = self.participants
        sites = [tuple(site) for site in self._sites()] if self._rules.mode is Mode.HIERARCHICAL else []
        alone = [(name,) for name in names if not any(name in site for site in sites)]
        length = len(self._cycle(names, [*sites, *alone]))
        self._exchanges = min(self._rules.mixes or length, MAX_EXCHANGE + 1)
        if not length:
            return ()
        place = self.position.round * self._exchanges + self.position.exchange
        order = order_of(names, self._rules.lineage, place // length)
        return self._cycle(order, [*sites, *alone])[place % length].get(self._us, ())

    def _cycle(self, order: Sequence[str], sites: Sequence[Collection[str]]) -> tuple[Readings, ...]:
        return cycle_of(self._rules.mode, order, group=self._rules.group, sites=sites)

    def _mix(self, now: float) -> tuple[Effect, ...]:
        """All that can be had is here."""
        inputs = self._partners.take(self.position.round)
        adopts = self.state is State.ADOPTING
        if adopts:
            self._partners.since(max((given.position.round for given in inputs), default=self.position.round))
        if not inputs:
            return self._publish() if adopts else self._next(now)
        self._mixed += inputs
        self._enter(State.MIXING)
        return (Mix(inputs, adopts),)

    def _next(self, now: float) -> tuple[Effect, ...]:
        """The next exchange of the round, or the next round."""
        if self.position.exchange + 1 < self._exchanges:
            self.position = Position(self.position.round, self.position.exchange + 1)
            return self._publish()
        if self.round - self.position.round > MAX_BEHIND:
            return self._begin(self.position.round, now)
        return self._train_or_wait(now)

    def _expired(self, now: float) -> tuple[Effect, ...]:
        if self.state is State.GATHERING:
            return self._train()
        if self.state is State.EXCHANGING and not self._late:
            self._late = True
            effects = self._partners.late(self._records)
            self.deadline = now + FETCH_S
            return effects + self._mix(now) if self._partners.done else effects
        return self._partners.give_up() + self._mix(now)

    def _enter(self, state: State, deadline: float | None = None) -> None:
        self.state, self.deadline = state, deadline
