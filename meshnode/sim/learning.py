"""A whole mesh of learners in virtual time: the real machines, records, codec and rules on a toy task.

What is imagined is the network (delays, losses, peers that are slow or away), the training (`toys.py`) and what
hostile peers send (`attacks.py`). One seed gives one course of events.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf
from random import Random
from typing import Final

import numpy as np
from nacl.signing import SigningKey

from meshnode.policy import gate, mixing, robust
from meshnode.policy.mixing import Outer, Theirs, staleness_weight
from meshnode.sim import baselines
from meshnode.sim.attacks import PLANS, Plan, Scene
from meshnode.sim.toys import Toy, Worker
from protocols.delta.checks import Expected, Refusal, judge_payload, judge_record
from protocols.delta.codec import pack_delta
from protocols.delta.frame import Vector
from protocols.delta.lineage import Lineage
from protocols.delta.messages import (
    MAX_PARENTS,
    MAX_RECENT,
    Codec,
    DeltaRecord,
    Made,
    Position,
    open_delta,
    record_cid,
    sign_delta,
)
from protocols.ids import RAW, Cid, PeerId, cid_of, cid_to_bytes, peer_id_of
from protocols.round import events
from protocols.round.events import Fetch, Input, Mix, Publish, Skip, Train
from protocols.round.machine import RoundMachine, Rules
from protocols.round.schedule import Mode

TRAIN_S: Final = 10.0  # a round of an ordinary node
DELAY_S: Final = (0.02, 0.15)  # of a record, and of each way of a fetch
REPAIR_S: Final = 5.0  # until anti-entropy brings a record that gossip lost
NOTICE_S: Final = 12.0  # until a peer that went away is given up
FETCH_FAILS_S: Final = 10.0
LARGEST: Final = 1e4  # value of an adapter; any larger one has diverged


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One experiment. Nodes 0 to nodes - 1; the last `hostile` ones are."""

    nodes: int
    rounds: int
    rules: Rules
    seed: int
    rule: str = "own"  # how deltas are mixed: "own" (cap and CS+), "plain", or a name of `baselines.RULES`
    gated: bool = False  # whether deltas are judged on the shared suite first
    codec: Codec = Codec.INT8
    feedback: bool = True  # whether what a codec left over goes into the next delta
    hostile: int = 0
    attack: str = ""  # a name of `attacks.PLANS`
    loss: float = 0.0  # part of the records that gossip loses
    slow: tuple[int, ...] = ()  # nodes that train ten times as long
    away: tuple[tuple[int, float, float], ...] = ()  # node, from, until: seconds


@dataclass(frozen=True, slots=True)
class Course:
    """What became of it."""

    scores: tuple[float, ...]  # of each honest node, at the end of its last round
    vectors: tuple[Vector, ...]
    rounds: tuple[int, ...]  # that each honest node has reached
    sent: int  # bytes of deltas that honest nodes fetched
    published: int  # deltas of honest nodes
    refused: Counter[tuple[str, str]]  # (honest or hostile, why) -> deltas that honest nodes refused
    skipped: int
    diverged: int  # honest nodes whose adapter left all bounds; they stop
    mixed_twice: int  # deltas that a node mixed again: there should be none
    seconds: float  # virtual
    lineage: Lineage  # of node 0

    @property
    def score(self) -> float:
        return float(np.mean(self.scores))


@dataclass(slots=True)
class _Learner:
    index: int
    key: SigningKey
    peer: PeerId
    machine: RoundMachine
    worker: Worker
    vector: Vector
    lineage: Lineage
    plan: Plan | None  # of a hostile one
    before: Vector  # when this round's training began
    sent: Vector  # our adapter as others read it
    residual: Vector | None = None
    outer: Outer | None = None
    recent: tuple[Made, ...] = ()
    last: dict[PeerId, DeltaRecord] = field(default_factory=dict)
    distances: list[float] = field(default_factory=list)
    mixed: set[tuple[PeerId, Position]] = field(default_factory=set)
    own_record: Cid | None = None
    here: bool = True
    done: bool = False


class Simulation:
    """Runs one setting."""

    def __init__(self, toy: Toy, setting: Setting) -> None:
        self._toy = toy
        self._setting = setting
        self._chance = Random(setting.seed)
        self._now = 0.0
        self._queue: list[tuple[float, int, int, events.Event | str]] = []
        self._count = 0
        self._payloads: dict[Cid, bytes] = {}
        self._records: dict[tuple[PeerId, Cid], DeltaRecord] = {}  # by signer and delta
        self._names: dict[tuple[PeerId, Position], Cid] = {}  # of the signed records
        self._decoded: dict[Cid, Vector] = {}  # each is read once, not by every receiver
        self._frame = toy.frame.cid
        self._base = toy.start()
        self._course = Course((), (), (), 0, 0, Counter(), 0, 0, 0, 0.0, Lineage(self._frame))
        self._totals: Counter[str] = Counter()
        plan = PLANS[setting.attack] if setting.attack else None
        self._learners = [
            self._learner(i, plan if i >= setting.nodes - setting.hostile else None) for i in range(setting.nodes)
        ]
        self._by_peer = {learner.peer: learner for learner in self._learners}

    def _learner(self, index: int, plan: Plan | None) -> _Learner:
        key = SigningKey(index.to_bytes(32, "big"))
        peer = peer_id_of(bytes(key.verify_key))
        return _Learner(
            index=index,
            key=key,
            peer=peer,
            machine=RoundMachine(peer, self._setting.rules),
            worker=self._toy.worker(index, plan.poison if plan else ""),
            vector=self._base.copy(),
            lineage=Lineage(self._frame),
            plan=plan,
            before=self._base,
            sent=self._base,
            outer=Outer.start(self._base) if self._setting.rules.mode is Mode.NOLOCO else None,
        )

    @property
    def _honest(self) -> list[_Learner]:
        return [learner for learner in self._learners if learner.plan is None]

    # ------------------------------------------------------------ time

    def run(self) -> Course:
        """Until every honest node that is not away has done its rounds."""
        for index, start, end in self._setting.away:
            self._at(start, index, "away")
            self._at(end, index, "back")
        for learner in self._learners:
            self._at(self._chance.uniform(0, 1), learner.index, events.Begin())
        while self._queue and not all(learner.done or not learner.here for learner in self._honest):
            self._now, _, index, event = heapq.heappop(self._queue)
            learner = self._learners[index]
            if event == "away":
                self._go(learner)
            elif event == "back":
                learner.here = True
                self._tell(learner, events.Begin(learner.machine.position.round))
            elif not isinstance(event, str) and learner.here:
                self._tell(learner, event)
        honest = self._honest
        return Course(
            scores=tuple(self._toy.score(learner.vector) for learner in honest),
            vectors=tuple(learner.vector for learner in honest),
            rounds=tuple(learner.machine.position.round for learner in honest),
            sent=self._totals["sent"],
            published=self._totals["published"],
            refused=self._course.refused,
            skipped=self._totals["skipped"],
            diverged=self._totals["diverged"],
            mixed_twice=self._totals["twice"],
            seconds=self._now,
            lineage=self._learners[0].lineage,
        )

    def _at(self, when: float, index: int, event: events.Event | str) -> None:
        self._count += 1
        heapq.heappush(self._queue, (when, self._count, index, event))

    def _after(self, seconds: float, learner: _Learner, event: events.Event) -> None:
        self._at(self._now + seconds, learner.index, event)

    def _delay(self) -> float:
        return self._chance.uniform(*DELAY_S)

    def _go(self, learner: _Learner) -> None:
        """It loses its power: nothing of what it was doing comes to an end."""
        learner.here = False
        learner.machine.handle(events.Stop(), self._now)
        for other in self._learners:
            if other is not learner:
                self._after(NOTICE_S, other, events.Left(learner.peer))

    def _tell(self, learner: _Learner, event: events.Event) -> None:
        machine = learner.machine
        if isinstance(event, events.Expired) and (machine.deadline is None or machine.deadline > self._now):
            return
        if isinstance(event, events.Arrived) and not self._takes(learner, event.record):
            return
        if not machine.expects(event):
            return  # of a round before it went away
        before = machine.deadline
        for effect in machine.handle(event, self._now):
            match effect:
                case Train(number):
                    self._train(learner, number)
                case Publish(position, mixed):
                    self._publish(learner, position, mixed)
                case Fetch(peer, delta):
                    self._fetch(learner, peer, delta)
                case Mix(inputs, adopts):
                    self._mix(learner, inputs, adopts)
                case Skip():
                    self._totals["skipped"] += 1
        if machine.deadline is not None and machine.deadline != before:
            self._at(machine.deadline, learner.index, events.Expired())

    # ------------------------------------------------------------ one node's round

    def _train(self, learner: _Learner, number: int) -> None:
        if number > self._setting.rounds:
            learner.done = True  # goes on, so that others have somebody to exchange with, but learns nothing more
        learner.before = learner.vector
        if not learner.done or learner.plan is not None:
            learner.vector = learner.worker.train(learner.vector, number)
        slow = 10 if learner.index in self._setting.slow else 1
        self._after(slow * TRAIN_S * self._chance.uniform(0.8, 1.2), learner, events.Trained())

    def _publish(self, learner: _Learner, position: Position, mixed: tuple[Input, ...]) -> None:
        if not np.abs(learner.vector).max() < LARGEST:
            self._totals["diverged"] += learner.plan is None
            learner.done = True
            learner.machine.handle(events.Stop(), self._now)
            return
        adds = self._setting.rules.mode is Mode.BROADCAST
        whole = None
        if adds:
            whole = self._stored(position, pack_delta(Codec.INT8, learner.before - self._base).payload)
            count = len(learner.machine.participants)
            change = (learner.vector - learner.before) / np.float32(count)
            packed = pack_delta(self._setting.codec, change, learner.residual)
            learner.residual = packed.residual if self._setting.feedback else None
            learner.vector = mixing.added(learner.before, [packed.sent])
        else:
            packed = pack_delta(self._setting.codec, learner.vector - self._base)
            learner.sent = self._base + packed.sent
        made = self._stored(position, packed.payload)
        parents = [cid for given in mixed if (cid := self._names.get((given.peer, given.position)))]
        parents += [learner.own_record] if learner.own_record else []
        record = DeltaRecord(
            peer=learner.peer,
            frame=cid_to_bytes(self._frame),
            made=made,
            codec=self._setting.codec,
            adds=adds,
            whole=whole,
            parents=tuple(sorted({cid_to_bytes(cid) for cid in parents}))[:MAX_PARENTS],
            privacy=None,
            recent=learner.recent,
        )
        data = sign_delta(learner.key, record)
        learner.own_record = record_cid(data)
        learner.recent = (made, *learner.recent)[:MAX_RECENT]
        if learner.plan is None:
            self._totals["published"] += 1
        opened = open_delta(data)
        self._names[learner.peer, position] = learner.own_record
        self._records[learner.peer, made.name] = opened
        self._learners[0].lineage.add(data, opened)
        for other in self._learners:
            if other is not learner:
                lost = self._chance.random() < self._setting.loss
                self._after(self._delay() + (REPAIR_S if lost else 0), other, events.Arrived(opened))
        self._after(0.0, learner, events.Published())

    def _stored(self, position: Position, payload: bytes) -> Made:
        cid = cid_of(RAW, payload)
        self._payloads[cid] = payload
        return Made(round=position.round, exchange=position.exchange, cid=cid_to_bytes(cid), size=len(payload))

    def _expected(self, learner: _Learner) -> Expected:
        return Expected(
            frame=self._frame,
            parameters=self._toy.frame.parameters,
            base=None,
            round=learner.machine.round,
            adds=self._setting.rules.mode is Mode.BROADCAST,
        )

    def _takes(self, learner: _Learner, record: DeltaRecord) -> bool:
        peer = PeerId(record.peer)
        last = learner.last.get(peer)
        if last is not None and last.position > record.position:
            return False  # overtaken on its way: the directory keeps the newest record alone
        refusal = judge_record(record, self._expected(learner), may_train=True, last=last)
        if refusal is not None:
            self._note_refusal(learner, peer, refusal.why.value)
            return False
        learner.last[peer] = record
        return True  # of whatever round: it tells where its signer is

    def _note_refusal(self, learner: _Learner, peer: PeerId, why: str) -> None:
        if learner.plan is None:
            kind = "honest" if self._by_peer[peer].plan is None else "hostile"
            self._course.refused[kind, why] += 1

    def _fetch(self, learner: _Learner, peer: PeerId, delta: Cid) -> None:
        if not self._by_peer[peer].here:
            self._after(FETCH_FAILS_S, learner, events.Refused(peer, delta, "it is not here"))
            return
        if learner.plan is None:
            self._totals["sent"] += len(self._payloads[delta])
        self._after(2 * self._delay(), learner, events.Fetched(peer, delta))

    # ------------------------------------------------------------ mixing

    def _read(self, learner: _Learner, given: Input) -> Vector:
        """A delta as its receiver gets it; hostile ones are made for the receiver."""
        giver = self._by_peer[given.peer]
        if giver.plan is not None and giver.plan.attack is not None and learner.plan is None:
            honest = [other for other in self._honest if other.here]
            scene = Scene(
                before=giver.before,
                trained=giver.vector,
                honest_before=[other.before for other in honest],
                honest=[other.sent for other in honest],
                victim=learner.sent,
                hostile=self._setting.hostile,
            )
            return giver.plan.attack(scene)
        record = self._records.get((given.peer, given.delta))
        known = self._decoded.get(given.delta)
        if known is not None:
            return known
        codec = self._setting.codec if record is not None else Codec.INT8  # the whole of one that adds
        payload = self._payloads[given.delta]
        made = Made(round=given.position.round, exchange=0, cid=cid_to_bytes(given.delta), size=len(payload))
        read = judge_payload(payload, made, codec, self._expected(learner), most_norm=inf, who=given.peer)
        assert not isinstance(read, Refusal), read.sentence
        adds = self._setting.rules.mode is Mode.BROADCAST and record is not None
        self._decoded[given.delta] = read if adds else self._base + read
        return self._decoded[given.delta]

    def _mix(self, learner: _Learner, inputs: tuple[Input, ...], adopts: bool) -> None:
        vectors = [self._read(learner, given) for given in inputs]
        mode = self._setting.rules.mode
        names = {(given.peer, given.position) for given in inputs}
        self._totals["twice"] += 0 if adopts else len(names & learner.mixed)
        learner.mixed = set() if adopts else learner.mixed | names
        if adopts:
            learner.vector = mixing.adopted(vectors)
        elif mode is Mode.BROADCAST:
            learner.vector = mixing.added(learner.vector, vectors)
        elif learner.plan is not None:
            learner.vector = mixing.averaged(learner.vector, learner.sent, self._weighted(inputs, vectors))
        else:
            kept = self._sifted(learner, inputs, vectors)
            self._combine(learner, [inputs[i] for i in kept], [vectors[i] for i in kept])
        if adopts:
            learner.before = learner.sent = learner.vector
        self._after(0.0, learner, events.Mixed())

    def _weighted(self, inputs: Sequence[Input], vectors: Sequence[Vector]) -> list[Theirs]:
        return [
            Theirs(vector, float(given.weight) * staleness_weight(given.staleness))
            for given, vector in zip(inputs, vectors, strict=True)
        ]

    def _sifted(self, learner: _Learner, inputs: Sequence[Input], vectors: Sequence[Vector]) -> list[int]:
        """Which of the vectors are plausible, and good enough on the shared suite."""
        kept = list(range(len(inputs)))
        if self._setting.rule == "own":
            distances = [robust.distance(vector, learner.sent) for vector in vectors]
            cap = robust.cap_of(learner.distances, distances)
            for i in kept:
                if not distances[i] <= cap:
                    self._note_refusal(learner, inputs[i].peer, "cap")
            kept = [i for i in kept if distances[i] <= cap]
            learner.distances += [distances[i] for i in kept]
        if self._setting.gated:
            passed = [i for i in kept if self._passes(learner, inputs[i], vectors[i])]
            for i in sorted(set(kept) - set(passed)):
                self._note_refusal(learner, inputs[i].peer, "gate")
            kept = passed
        return kept

    def _passes(self, learner: _Learner, given: Input, vector: Vector) -> bool:
        labels = self._toy.suite_labels
        rows = _draw(labels, given.delta, given.position.round)
        mix = np.asarray((learner.vector + vector) / 2, np.float32)
        own, mixed = (self._toy.losses(one, rows) for one in (learner.vector, mix))
        return gate.judge([labels[row] for row in rows], own, mixed).passes

    def _combine(self, learner: _Learner, inputs: Sequence[Input], vectors: Sequence[Vector]) -> None:
        theirs = self._weighted(inputs, vectors)
        if self._setting.rule == "own":
            mixed = robust.clipped_sum(learner.vector, learner.sent, theirs, robust.hostile_weight(theirs))
        elif self._setting.rule == "plain":
            mixed = mixing.averaged(learner.vector, learner.sent, theirs)
        else:
            mixed = baselines.apply(self._setting.rule, learner.vector, vectors, self._setting.hostile)
        match self._setting.rules.mode:
            case Mode.ELASTIC:
                learner.vector = mixing.elastic(learner.vector, learner.sent, theirs)
            case Mode.NOLOCO if learner.outer is not None:
                learner.outer = mixing.outer_step(learner.outer, mixed)
                learner.vector = learner.outer.slow
            case _:
                learner.vector = mixed


@lru_cache(1024)
def _draw(labels: tuple[str, ...], delta: Cid, round_number: int) -> tuple[int, ...]:
    """Every receiver draws the same samples."""
    return gate.draw(labels, delta, round_number)


def simulate(toy: Toy, setting: Setting) -> Course:
    """Run one setting to its end."""
    return Simulation(toy, setting).run()
