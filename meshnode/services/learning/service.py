"""Follows the lesson of the network, as long as this device may train and its owner wants it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from meshnode.core.errors import Declined, DiskError, FatalError, TransientError
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.services.learning.ground import Ground
from meshnode.services.learning.lessons import Given, followed
from meshnode.services.learning.report import Report
from meshnode.services.port import Attention, Comparison, Owner, Proposals, Ranks
from meshnode.state.samples_port import SampleBuffer
from protocols.backoff import Backoff
from protocols.errors import MeshError, ProtocolError
from protocols.ids import PeerId, short
from protocols.membership.messages import TRAIN
from protocols.notice.messages import LESSON
from protocols.rollout.messages import Candidate

if TYPE_CHECKING:
    from meshnode.services.learning.course import Permission
    from meshnode.services.learning.privacy import PrivateSteps
    from meshnode.services.learning.rhythm import Rhythm
    from meshnode.services.learning.worker import Study
    from meshnode.trainer.port import Trainer

RETRY_S: Final = (5.0, 300.0)  # after a lesson could not be followed: first, cap
REST_S: Final = 120.0  # after a lesson the trainer is kept for so long: what was learned will be judged

_log = get_logger("learning")


@dataclass(frozen=True, slots=True, kw_only=True)
class School:
    """What a device learns with; a node that does not learn has none."""

    folder: Path  # what was learned is kept here
    trainer: Trainer
    samples: SampleBuffer
    permission: Permission
    owner: Owner
    rhythm: Rhythm
    private: PrivateSteps | None = None  # None: training is not differentially private


class LearningService:
    """One course at a time."""

    name = "learning"

    def __init__(
        self, ground: Ground, ranks: Ranks, attention: Attention, school: School | None, health: Health
    ) -> None:
        """`attention`: whether questions are answered here. `school`: None when `learn.enabled` is off."""
        self._ground = ground
        self._ranks = ranks
        self._attention = attention
        self._school = school
        self._health = health
        self._proposals: Proposals | None = None
        self._judging = trio.Lock()
        self.report = Report()

    def propose_to(self, proposals: Proposals) -> None:
        """Where adapters go that are made here."""
        self._proposals = proposals

    # ------------------------------------------------------------ judging (`Judge` of services/port.py)

    @property
    def changes(self) -> Changes:
        """See `Judge`."""
        return self._ground.notices.changes

    @property
    def suite(self) -> str:
        """See `Judge`."""
        given = self.given
        return "" if given is None else given.lesson.suite_cid

    async def compare(self, candidate: Candidate, seed: int) -> Comparison:
        """See `Judge`. Raises also Declined `no-judge` on a device that does not learn."""
        school, given = self._school, self.given
        if school is None:
            raise Declined("no-judge", "this device has no trainer to judge adapters with: learn.enabled is off")
        if given is None or given.lesson.suite_cid != candidate.suite:
            raise Declined("no-judge", f"the candidate {candidate.version} is to be judged on another suite")
        from meshnode.services.learning.judging import compare

        suite = (await self._study(given)).suite
        await school.permission.wait(self.report)
        async with self._judging:
            return await compare(self._ground, school, suite, candidate, seed)

    # ------------------------------------------------------------ learning

    @property
    def given(self) -> Given | None:
        """The lesson that goes before all others."""
        return followed(self._ground.notices.all(LESSON), self._ranks.is_founder)[0]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow lessons until cancelled; a job under way goes on with its last step after a restart."""
        task_status.started()
        if self._school is None:
            self.report.why = "this device does not learn: learn.enabled is off"
            await trio.sleep_forever()
        assert self._school is not None
        try:
            while True:
                version = self._ground.notices.changes.version
                given = self.given
                async with trio.open_nursery() as nursery:
                    if given is not None:
                        nursery.start_soon(self._follow, given, self._school)
                    else:
                        self.report.state, self.report.why = "waiting", "there is no lesson: meshnode learn start"
                    while self.given == given:
                        version = await self._ground.notices.changes.wait(version)
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._school.trainer.aclose()

    async def _follow(self, given: Given, school: School) -> None:
        """A course, begun again whenever the world failed it. Returns when its rounds are over."""
        self.report = Report(state="preparing", lesson=given.cid, mode=given.lesson.mode, rounds=given.lesson.rounds)
        backoff = Backoff(*RETRY_S)
        while True:
            reason = ""
            try:
                await self._attend(given, school)
            except* (TransientError, Declined) as group:
                reason = _words(group)
            except* (FatalError, ProtocolError) as group:
                reason = _words(group)
                self._health.set("learning-failed", reason=reason)
            if not reason:
                self._health.clear("learning-failed")
                return
            self.report.state, self.report.why = "waiting", reason
            _log.warning("learning.waits", reason=reason)
            await trio.sleep(backoff.next())

    async def _attend(self, given: Given, school: School) -> None:
        from meshnode.services.learning.course import Course, open_desk
        from meshnode.services.learning.making import make_adapter
        from meshnode.services.learning.permission import give_way
        from meshnode.services.learning.worker import open_model

        ground, report = self._ground, self.report
        if not ground.rights.has(ground.us, TRAIN):
            raise Declined(
                "forbidden",
                f"this node may not train: it lacks the role {TRAIN} (meshnode invite --roles serve,{TRAIN})",
            )
        if not school.samples.summary().labelled:
            raise Declined("no-samples", "this device has no samples to learn from yet (meshnode data import)")
        study = await self._study(given)
        report.frame, report.model = study.frame.cid, study.frame.base
        with ExitStack() as opened:
            report.why = "fetching the model's variant for training"
            model = await open_model(ground.content, study.frame.base, opened)
            report.why = ""
            desk = await open_desk(ground, study, school, model, report)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(give_way, school.trainer, self._attention, school.owner, report)
                if not desk.page.done:
                    await Course(desk, school.permission, report).run(ground.notices.changes)
                nursery.cancel_scope.cancel()
            report.state = "done"
            _log.info("learning.done", lesson=short(given.cid), steps=desk.page.steps)
            if self._proposals is not None and not desk.page.adapter:
                participants = [PeerId(peer) for peer in report.participants]
                try:
                    await make_adapter(ground, study, desk.book, desk.page, self._proposals, participants)
                except Declined as error:
                    report.why = f"what was learned is not proposed: {error}"
        report.adapter = desk.page.adapter
        await trio.sleep(REST_S)
        async with self._judging:
            await school.trainer.aclose()

    async def _study(self, given: Given) -> Study:
        """All that a lesson names. Raises ContentUnavailable, ModelError, DiskError, RemoteProtocolError."""
        from meshnode.services.learning.lessons import read_suite
        from meshnode.services.learning.worker import Study
        from protocols.delta.frame import decode_frame
        from protocols.manifest.messages import FileRef

        ground, lesson = self._ground, given.lesson
        frame = decode_frame(lesson.frame)
        file = await ground.content.open(FileRef(cid=lesson.suite_cid, size=lesson.suite_size))
        try:
            data = await ground.workers.run(file.path.read_bytes)
        except OSError as error:
            raise DiskError(f"The suite can't be read: {error.strerror or error}.") from error
        finally:
            file.close()
        return Study(given.cid, lesson, frame, read_suite(data))


def _words(group: BaseExceptionGroup[MeshError]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)
