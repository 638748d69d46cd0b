"""When this device trains: not while it answers questions, and only when its owner's rule allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from meshnode.core.signal import Watch
from meshnode.policy.idle import DeviceFacts, IdleRule, may_train
from meshnode.services.learning.report import Report
from meshnode.services.port import Attention, Owner

if TYPE_CHECKING:
    from meshnode.trainer.port import Trainer

LOOK_S: Final = 30.0  # between looks at a device that is busy
QUIET_S: Final = 1.0  # without a question before training goes on


class IdlePermission:
    """Implements `Permission` of course.py."""

    def __init__(self, facts: Callable[[], DeviceFacts], rule: IdleRule, owner: Owner) -> None:
        self._facts = facts
        self._rule = rule
        self._owner = owner

    async def wait(self, report: Report) -> None:
        """Until the device may train."""
        while True:
            version = self._owner.changes.version
            if not self._owner.duty.background:
                report.why = f"training waits: this node is {self._owner.duty.word}, because {self._owner.why}"
                await self._owner.changes.wait(version)
            elif not (verdict := may_train(self._facts(), self._rule)).may:
                report.why = f"training waits: {verdict.why}"
                with trio.move_on_after(LOOK_S):
                    await self._owner.changes.wait(version)
            else:
                break
        report.why = ""


async def give_way(trainer: Trainer, attention: Attention, owner: Owner, report: Report) -> None:
    """Stop the trainer in the middle of whatever it computes while questions are answered here, or the owner wants
    no background work; until cancelled."""
    watch = Watch(attention.counted, owner.changes)
    try:
        while True:
            if attention.sessions or not owner.duty.background:
                trainer.pause()
                report.paused = True
            elif report.paused:
                with trio.move_on_after(QUIET_S) as quiet:
                    await watch.next()
                if quiet.cancelled_caught:
                    trainer.resume()
                    report.paused = False
                continue
            await watch.next()
    finally:
        trainer.resume()
        report.paused = False
