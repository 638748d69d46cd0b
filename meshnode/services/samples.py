"""What this device remembers of its answers, and whether they have become worse."""

from __future__ import annotations

from typing import Final, Protocol

import trio

from meshnode.core.clock import Wall
from meshnode.core.errors import DiskError
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.policy.drift import LAST, Drift, drift_of
from meshnode.state.samples_port import Sample, SampleBuffer
from meshnode.text.question import Question
from protocols.errors import MeshError

LOOK_S: Final = 60.0  # between looks at what other processes have put in

_log = get_logger("samples")


class Prompts(Protocol):
    """Questions as the model sees them."""

    async def shown(self, question: Question) -> str:
        """The text up to where the answer begins. Raises MeshError when there is none, or nobody to ask for it."""


class SamplesService:
    """Keeps answers until somebody judges them. What is kept stays on this device."""

    name = "samples"

    def __init__(self, buffer: SampleBuffer, prompts: Prompts, health: Health, wall: Wall, *, keep: bool) -> None:
        """`keep`: whether answers are kept at all (`learn.keep_answers`)."""
        self.buffer = buffer
        self._prompts = prompts
        self._health = health
        self._wall = wall
        self._keep = keep

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Looks at the judgements once a minute, for commands write them, too."""
        task_status.started()
        while True:
            try:
                self.look()
            except DiskError as error:
                self._health.set("samples-unusable", reason=str(error))
            await trio.sleep(LOOK_S)

    async def keep(self, question: Question, answer: str) -> int | None:
        """Remember an answer; its id, or None when it is not kept. Never raises because of that."""
        if not self._keep:
            return None
        try:
            kept = self.buffer.keep_answer(await self._prompts.shown(question), answer, self._wall())
        except DiskError as error:
            self._health.set("samples-unusable", reason=str(error))
            return None
        except MeshError as error:
            _log.debug("answer.skipped", reason=str(error))
            return None
        self._health.clear("samples-unusable")
        return kept

    def judge(self, id: int, correct: bool, label: str) -> Sample:
        """See `SampleBuffer.judge`."""
        judged = self.buffer.judge(id, correct, label, self._wall())
        self.look()
        return judged

    def look(self) -> Drift:
        """How the last judgements are, and have people told when they are bad. Raises DiskError."""
        drift = drift_of(self.buffer.judgements(LAST))
        if drift.alarming:
            self._health.set("drift", wrong=drift.wrong, judged=drift.judged, percent=round(100 * drift.rate))
        else:
            self._health.clear("drift")
        return drift
