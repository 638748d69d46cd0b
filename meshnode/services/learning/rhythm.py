"""When this device trains its next round, and how many steps, where the lesson leaves that to it (`steps` is 0)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import trio

from meshnode.policy.idle import DeviceFacts
from meshnode.policy.randomness import Randomness
from meshnode.policy.training import Choice, Scheduler, Situation, fixed
from meshnode.services.learning.report import Report


class Rhythm:
    """The owner's schedule: by experience, or at fixed intervals."""

    def __init__(
        self, facts: Callable[[], DeviceFacts], rng: Randomness, *, by_experience: bool, interval_s: float, steps: int
    ) -> None:
        """`interval_s`: from one round to the next, or between two looks. `steps`: of an ordinary round."""
        self.steps = steps
        self._facts = facts
        self._rng = rng
        self._interval_s = interval_s
        self._scheduler = Scheduler(steps, rng) if by_experience else None
        self._last_at = -interval_s
        self._last_gain = 0.0
        self._made: tuple[Situation, Choice] | None = None

    @property
    def experience(self) -> dict[str, Any] | None:
        """What has been learned about training, as plain data."""
        return None if self._scheduler is None else self._scheduler.as_json()

    def restore(self, experience: dict[str, Any] | None) -> None:
        """Go on with what `experience` gave before a restart."""
        if self._scheduler is not None:
            self._scheduler = Scheduler(self.steps, self._rng, experience)

    async def next_steps(self, new_samples: int, partners: Sequence[str], report: Report) -> int:
        """Wait until it is worth training; the steps of the round. If cancelled: nothing happened."""
        while True:
            choice = self._choose(new_samples, partners)
            report.why = choice.why
            if choice.steps:
                self._last_at = trio.current_time()
                return choice.steps
            await trio.sleep(self._interval_s)

    def _choose(self, new_samples: int, partners: Sequence[str]) -> Choice:
        if self._scheduler is None:
            return fixed(trio.current_time() - self._last_at, self._interval_s, self.steps, partners)
        facts = self._facts()
        situation = Situation(
            idle_s=facts.owner_idle_s if facts.owner_idle_s is not None else self._interval_s,
            new_samples=new_samples,
            last_gain=self._last_gain,
            battery=1.0 if facts.on_mains in (None, True) else (facts.battery_percent or 0) / 100,
        )
        choice = self._scheduler.choose(situation, partners)
        self._made = situation, choice
        return choice

    def learn(self, gain: float) -> None:
        """What the round has brought: loss before minus loss after."""
        self._last_gain = gain
        if self._scheduler is not None and self._made is not None:
            self._scheduler.learn(*self._made, gain)
            self._made = None
