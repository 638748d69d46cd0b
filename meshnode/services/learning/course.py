"""One lesson, followed by one node: carries out what the round machine orders, and tells it what became of that."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import numpy as np
import trio

from meshnode.core.errors import TrainerLost
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.core.workers import Workers
from meshnode.services.learning.adapters import start_of
from meshnode.services.learning.book import Book, Page
from meshnode.services.learning.cohort import Cohorts, rules_of
from meshnode.services.learning.exchange import Exchange, Told, told_of
from meshnode.services.learning.ground import Ground
from meshnode.services.learning.mixing import Arrived as Came
from meshnode.services.learning.mixing import Mixer
from meshnode.services.learning.report import Report
from meshnode.services.learning.rhythm import Rhythm
from meshnode.services.learning.service import School
from meshnode.services.learning.worker import Study, Worker
from meshnode.trainer.port import ModelFiles, Step
from protocols.backoff import Backoff
from protocols.delta.checks import Expected
from protocols.delta.frame import Vector
from protocols.delta.messages import MAX_RECENT, Codec
from protocols.ids import RAW, Cid, PeerId, cid_from_bytes, cid_of, short
from protocols.round.events import (
    Arrived,
    Begin,
    Effect,
    Event,
    Expired,
    Fetch,
    Fetched,
    Left,
    Mix,
    Mixed,
    Publish,
    Published,
    Refused,
    Skip,
    Stop,
    Train,
    Trained,
)
from protocols.round.machine import RoundMachine, Rules, State
from protocols.round.schedule import Mode

MAX_EVENTS: Final = 4096
TRAINER_PAUSE_S: Final = (1.0, 60.0)  # after the trainer was lost: first, cap
MAX_LOST: Final = 5  # times in a row that the trainer may be lost in one job

Result = TypeVar("Result")

_log = get_logger("learning")


class Permission(Protocol):
    """Whether this device may train now (`idle rule`)."""

    async def wait(self, report: Report) -> None:
        """Until it may. If cancelled: nothing happened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What one course works with."""

    study: Study
    book: Book
    page: Page
    worker: Worker
    exchange: Exchange
    machine: RoundMachine
    start: Vector  # that all begin with, and that deltas count from
    cohorts: Cohorts | None  # of the mode masked
    workers: Workers
    rhythm: Rhythm
    us: PeerId


class Course:
    """Follows one lesson to its end."""

    def __init__(self, desk: Desk, permission: Permission, report: Report) -> None:
        self._desk = desk
        self._permission = permission
        self._report = report
        lesson = desk.study.lesson
        self._base = desk.start
        self._mixer = Mixer(desk.page, self._base, Mode(lesson.mode), Codec(lesson.codec))
        self._told = Told()
        self._parents: list[Cid] = []  # records that were mixed since the last delta of ours
        self._trained = False  # since our last delta
        self._fetched: dict[tuple[PeerId, Cid], Vector] = {}
        self._send, self._receive = trio.open_memory_channel[Event](MAX_EVENTS)

    async def run(self, changes: Changes) -> None:
        """Until the rounds of the lesson are over.

        Args:
          changes: of the notices.

        Raises, in a group, what the trainer and the disk raise; Declined when this node may not train any more.
        """
        machine = self._desk.machine
        async with trio.open_nursery() as nursery:
            version = changes.version
            self._look()
            nursery.start_soon(self._watch, changes, version)
            after = max(self._desk.page.published, self._desk.exchange.given_away())
            await self._handle(Begin(after), nursery)
            while machine.state is not State.RESTING:
                event: Event = Expired()
                with trio.move_on_at(machine.deadline if machine.deadline is not None else float("inf")):
                    event = await self._receive.receive()
                if machine.expects(event):
                    await self._handle(event, nursery)
            nursery.cancel_scope.cancel()

    async def _watch(self, changes: Changes, version: int) -> None:
        while True:
            version = await changes.wait(version)
            self._look()

    def _look(self) -> None:
        fresh, caught = self._desk.exchange.look()
        for peer in caught:
            self._tell(Left(peer))
        for record in fresh:
            self._tell(Arrived(record))

    def _tell(self, event: Event) -> None:
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            _log.warning("learning.event_lost", kind=type(event).__name__)

    # ------------------------------------------------------------ orders

    async def _handle(self, event: Event, nursery: trio.Nursery) -> None:
        machine, report = self._desk.machine, self._report
        effects = machine.handle(event, trio.current_time())
        report.state, report.round = machine.state.value, machine.position.round
        report.participants = tuple(machine.participants)
        for effect in effects:
            await self._carry_out(effect, nursery)

    async def _carry_out(self, effect: Effect, nursery: trio.Nursery) -> None:
        match effect:
            case Train(round=number) if number > self._desk.study.lesson.rounds:
                await self._finish(nursery)
            case Train(round=number):
                nursery.start_soon(self._train, number)
            case Publish():
                nursery.start_soon(self._publish, effect)
            case Fetch(peer=peer, delta=delta):
                nursery.start_soon(self._fetch, peer, delta)
            case Mix():
                await self._mix(effect)
                self._tell(Mixed())
            case Skip(peer=peer, reason=reason):
                self._report.skipped[reason] += 1
                _log.info("learning.skipped", peer=short(peer), reason=reason)

    async def _finish(self, nursery: trio.Nursery) -> None:
        """All rounds are done: the last mix stands."""
        desk = self._desk
        self._mixer.end()
        desk.page.done = True
        await desk.workers.run(desk.book.write, desk.page)
        await desk.workers.run(desk.book.write_adapter, desk.page.vector)
        await self._handle(Stop(), nursery)

    # ------------------------------------------------------------ training

    async def _train(self, number: int) -> None:
        desk, page, report = self._desk, self._desk.page, self._report
        desk.exchange.round_over()
        await self._permission.wait(report)
        folder = desk.book.job(page.steps)
        steps = desk.study.lesson.steps or await desk.rhythm.next_steps(
            desk.worker.fresh, [peer for peer in desk.machine.participants if peer != desk.us], report
        )

        def step(done: Step) -> None:
            report.losses.append(done.loss)

        done = await self._persist(
            lambda: desk.worker.train(number, page.vector, steps, page.steps, page.optimiser, folder, step)
        )
        trained = done.trained
        first = page.steps + 1
        page.vector, page.optimiser = trained.vector, str(trained.optimiser)
        page.steps += len(trained.losses)
        report.steps, report.samples = page.steps, done.samples
        report.train_s += trained.seconds
        self._trained = True
        self._told = told_of(done)
        desk.rhythm.learn(trained.losses[0] - trained.losses[-1])
        page.experience = desk.rhythm.experience
        await desk.workers.run(desk.book.write, page)
        await desk.workers.run(desk.book.note_losses, first, trained.losses)
        await desk.workers.run(desk.book.clear_jobs, page.optimiser)
        _log.info(
            "learning.trained", round=number, loss=round(trained.losses[-1], 4), seconds=round(trained.seconds, 1)
        )
        self._tell(Trained())

    async def _persist(self, job: Callable[[], Awaitable[Result]]) -> Result:
        """Do a job again when the trainer is lost: it goes on with the step it was at."""
        backoff = Backoff(*TRAINER_PAUSE_S)
        for attempt in range(1, MAX_LOST + 1):
            try:
                return await job()
            except TrainerLost as error:
                self._report.why = str(error)
                if attempt == MAX_LOST:
                    raise
                _log.warning("learning.trainer_lost", reason=str(error))
                await trio.sleep(backoff.next())
        raise AssertionError("the loop returns or raises")

    # ------------------------------------------------------------ giving

    async def _publish(self, order: Publish) -> None:
        desk, page = self._desk, self._desk.page
        if desk.cohorts is not None:
            await self._meet(desk.cohorts, order.position.round)
        participants = max(1, len(desk.machine.participants))
        packed, whole = await desk.workers.run(self._mixer.pack, participants)
        parents = (*self._parents, *((Cid(page.parent),) if page.parent else ()))
        made, record = await desk.exchange.publish(
            order.position, packed, whole=whole, told=self._told, parents=parents, recent=page.recent
        )
        self._parents, self._told, self._trained = [], Told(), False
        place = (made.round, made.exchange, str(cid_from_bytes(made.cid)), made.size)
        page.recent = [place, *page.recent][:MAX_RECENT]
        page.published, page.parent = made.round, record
        await desk.workers.run(desk.book.write, page)
        self._tell(Published())

    async def _meet(self, cohorts: Cohorts, number: int) -> None:
        """Put what was trained into the mean of our cohort. Only what all have is published, and how many steps and
        samples went into ours is not."""
        self._told = Told()
        if not self._trained:
            return
        desk = self._desk
        found = await cohorts.mean(number, desk.machine.participants, desk.machine.behind, self._mixer.difference)
        if found.mean is not None and await self._mean_is_good(number, found.mean):
            self._mixer.meet(found.mean, included=found.included)

    async def _mean_is_good(self, number: int, mean: Vector) -> bool:
        """Whether our cohort's mean gives back what it takes from what all had in common before. Nobody can look at
        what its members have put in; of one that is refused, ours goes into the next one."""
        desk = self._desk
        if not desk.study.lesson.gate:
            return True
        common = desk.page.reference
        assert common is not None
        drawn_by = cid_of(RAW, mean.tobytes())
        verdict = await self._persist(lambda: desk.worker.judge(common, self._base + mean, drawn_by, number))
        if not verdict.passes:
            self._report.refuse("gate", f"the mean of the cohort of round {number} is not taken: {verdict.words}")
        return verdict.passes

    # ------------------------------------------------------------ taking

    async def _fetch(self, peer: PeerId, delta: Cid) -> None:
        desk = self._desk
        norm = float(np.linalg.norm(self._mixer.difference))
        found = await desk.exchange.fetch(peer, delta, norm)
        if not isinstance(found, str) and not await self._good_enough(peer, delta, found):
            found = "it is worse on the suite"
        if isinstance(found, str):
            self._tell(Refused(peer, delta, found))
            return
        self._fetched[peer, delta] = found
        self._tell(Fetched(peer, delta))

    async def _good_enough(self, peer: PeerId, delta: Cid, difference: Vector) -> bool:
        """Whether a mix with an adapter gives back what it takes, on samples that nobody knew before it was given
        away."""
        desk = self._desk
        lesson = desk.study.lesson
        if not lesson.gate or lesson.mode == Mode.BROADCAST.value:  # a change of one round is no adapter
            return True
        number, own = desk.machine.position.round, desk.page.vector
        mix = np.asarray((own + self._base + difference) / 2, np.float32)
        verdict = await self._persist(lambda: desk.worker.judge(own, mix, delta, number))
        if verdict.passes:
            return True
        desk.exchange.judged(peer, used=False)
        self._report.refuse(
            "gate",
            f"the delta of {short(peer)} is not mixed in: {verdict.words}",
        )
        return False

    async def _mix(self, order: Mix) -> None:
        desk, exchange = self._desk, self._desk.exchange
        came = [
            Came(given, vector)
            for given in order.inputs
            if (vector := self._fetched.pop((given.peer, given.delta), None)) is not None
        ]
        if order.adopts:
            if came:
                await desk.workers.run(self._mixer.adopt, came)
            used = came
        else:
            used, far = await desk.workers.run(self._mixer.mix, came)
            for away in far:
                exchange.judged(away.given.peer, used=False)
                self._report.refuse(
                    "distance",
                    f"the delta of {short(away.given.peer)} is {away.far:.3g} away from ours; "
                    f"{away.most:.3g} is plausible at most",
                )
        for one in used:
            exchange.used(one.given, one.vector)
            record = exchange.record_of(one.given)
            if record is not None:
                self._parents.append(record)
        desk.page.mixed += len(used)
        await desk.workers.run(desk.book.write, desk.page)


def _mixes(mode: Mode, wanted: int) -> int:
    """Exchanges in a round: everybody has everything after one of the mode broadcast; 0, as many as make it exact."""
    return {Mode.BROADCAST: 1, Mode.MASKED: 0}.get(mode, wanted)


async def open_desk(ground: Ground, study: Study, school: School, model: ModelFiles, report: Report) -> Desk:
    """Everything at hand for one course, where it was left. Raises DiskError, and what `start_of` raises."""
    lesson, frame = study.lesson, study.frame
    book = Book(school.folder / frame.cid, frame.parameters)
    start = await start_of(ground.content, ground.workers, frame, lesson.start_cid)
    page = await ground.workers.run(book.read, study.cid) or Page(lesson=study.cid, vector=start.copy())
    report.steps = page.steps
    school.rhythm.restore(page.experience)
    mode = Mode(lesson.mode)
    lineage = f"{frame.cid}/{study.cid}"
    machine = RoundMachine(
        ground.us,
        Rules(
            lineage=lineage,
            mode=mode,
            mixes=_mixes(mode, lesson.mixes),
            wait_s=float(lesson.wait_s),
            least=lesson.least,
        ),
    )

    def expected() -> Expected:
        return Expected(
            frame=frame.cid,
            parameters=frame.parameters,
            base=lesson.start_cid,
            round=machine.round,
            adds=mode is Mode.BROADCAST,
        )

    exchange = Exchange(ground, expected, Codec(lesson.codec), report, book.folder)
    cohorts = None
    if mode is Mode.MASKED:
        cohorts = Cohorts(ground, exchange, lineage, rules_of(lesson.wait_s, frame.parameters), report)
    return Desk(
        study=study,
        book=book,
        page=page,
        worker=Worker(school, model, study, book.folder, ground.workers),
        exchange=exchange,
        machine=machine,
        start=start,
        cohorts=cohorts,
        workers=ground.workers,
        rhythm=school.rhythm,
        us=ground.us,
    )
