"""When this device trains: not while it answers questions, and only when its owner's rule allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from meshnode.policy.idle import DeviceFacts, IdleRule, may_train
from meshnode.services.learning.report import Report
from meshnode.services.port import Attention

if TYPE_CHECKING:
    from meshnode.trainer.port import Trainer

LOOK_S: Final = 30.0  # between looks at a device that is busy
QUIET_S: Final = 1.0  # without a question before training goes on


class IdlePermission:
    """Implements `Permission` of course.py."""

    def __init__(self, facts: Callable[[], DeviceFacts], rule: IdleRule) -> None:
        self._facts = facts
        self._rule = rule

    async def wait(self, report: Report) -> None:
        """Until the device may train."""
        while not (verdict := may_train(self._facts(), self._rule)).may:
            report.why = f"training waits: {verdict.why}"
            await trio.sleep(LOOK_S)
        report.why = ""


async def give_way(trainer: Trainer, attention: Attention, report: Report) -> None:
    """Stop the trainer in the middle of whatever it computes while questions are answered here; until cancelled."""
    try:
        while True:
            version = attention.counted.version
            if attention.sessions:
                trainer.pause()
                report.paused = True
            elif report.paused:
                with trio.move_on_after(QUIET_S) as quiet:
                    await attention.counted.wait(version)
                if quiet.cancelled_caught:
                    trainer.resume()
                    report.paused = False
                continue
            await attention.counted.wait(version)
    finally:
        trainer.resume()
        report.paused = False
