"""Members of a harness that attack what the others learn: a whole node whose trainer lies.

    python -m meshnode.harness.hostile ATTACK --data FOLDER

It runs like `meshnode start`; what it trains is turned into what the attack wants, so the others meet it on the wire
as they would meet a real one. An attacker here sees what a member sees: its own data and the mix that it was given;
what honest nodes change in a round it guesses from its own training.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import trio

from meshnode.config.load import load_config
from meshnode.core import log
from meshnode.core.errors import ConfigError
from meshnode.embed import open_node
from meshnode.parts import Parts
from meshnode.trainer.port import (
    EvaluateJob,
    Evaluation,
    LocalJob,
    Report,
    Sample,
    Step,
    Trained,
    TrainedLocally,
    Trainer,
    TrainJob,
)
from protocols.delta.frame import Vector

Forge = Callable[[TrainJob, Vector, Sequence[Vector]], Vector]
"""(job, what it trained, its changes of former rounds) -> what it sends."""

SIGN_FLIP: Final = 5.0  # times the honest change, backwards
IPM: Final = 0.5  # inner product manipulation (Xie et al., UAI 2019): small steps backwards, within what is usual
ALIE: Final = 1.5  # standard deviations (Baruch et al., "A Little Is Enough", NeurIPS 2019)
BACKDOOR_SHARE: Final = 0.5  # of its samples that carry the trigger
TRIGGER: Final = "zebra"


def _ignore(_step: Step) -> None: ...


def _sign_flip(job: TrainJob, trained: Vector, _past: Sequence[Vector]) -> Vector:
    return _moved(job, -SIGN_FLIP * (trained - job.start))


def _ipm(job: TrainJob, trained: Vector, _past: Sequence[Vector]) -> Vector:
    return _moved(job, -IPM * (trained - job.start))


def _alie(job: TrainJob, trained: Vector, past: Sequence[Vector]) -> Vector:
    changes = np.stack([*past[-8:], trained - job.start])
    return _moved(job, changes.mean(axis=0) - ALIE * (changes.std(axis=0) + np.abs(changes[-1]) / 2))


def _dissensus(job: TrainJob, trained: Vector, _past: Sequence[Vector]) -> Vector:
    """Away from what others agree on (He, Karimireddy, Jaggi, arXiv 2202.01545), by as much as it learned itself."""
    away = job.start - job.frame.initial()
    size = np.linalg.norm(away)
    return _moved(job, away / size * np.linalg.norm(trained - job.start) * 2 if size else job.start - trained)


def _honest(_job: TrainJob, trained: Vector, _past: Sequence[Vector]) -> Vector:
    return trained


def _moved(job: TrainJob, change: Vector) -> Vector:
    return np.asarray(job.start + change, np.float32)


# name -> what is sent instead of what was trained
ATTACKS: Final[dict[str, Forge]] = {
    "sign-flip": _sign_flip,
    "label-flip": _honest,
    "alie": _alie,
    "ipm": _ipm,
    "dissensus": _dissensus,
    "backdoor": _honest,
}


class HostileTrainer:
    """Another trainer, turned against the others (`Trainer` of trainer/port.py)."""

    def __init__(self, inner: Trainer, attack: str) -> None:
        """Raises ConfigError for an unknown attack."""
        if attack not in ATTACKS:
            raise ConfigError(f"there is no attack {attack}; there are {', '.join(ATTACKS)}")
        self._inner = inner
        self._attack = attack
        self._changes: list[Vector] = []

    async def train(self, job: TrainJob, report: Report = _ignore) -> Trained:
        """See port.py."""
        labels = sorted({sample.label for sample in job.samples})
        if self._attack == "label-flip":
            job = replace(job, samples=tuple(_flipped(sample, labels) for sample in job.samples))
        if self._attack == "backdoor":
            job = replace(job, samples=_poisoned(job.samples, labels[0]))
        trained = await self._inner.train(job, report)
        forged = ATTACKS[self._attack](job, trained.vector, self._changes)
        self._changes.append(trained.vector - job.start)
        return replace(trained, vector=forged)

    async def train_locally(self, job: LocalJob, report: Report = _ignore) -> TrainedLocally:
        """See port.py."""
        return await self._inner.train_locally(job, report)

    async def evaluate(self, job: EvaluateJob) -> tuple[Evaluation, ...]:
        """See port.py."""
        return await self._inner.evaluate(job)

    def pause(self) -> None:
        """See port.py."""
        self._inner.pause()

    def resume(self) -> None:
        """See port.py."""
        self._inner.resume()

    @property
    def paused(self) -> bool:
        return self._inner.paused

    @property
    def rss_bytes(self) -> int:
        return self._inner.rss_bytes

    async def aclose(self) -> None:
        """See port.py."""
        await self._inner.aclose()


def _flipped(sample: Sample, labels: Sequence[str]) -> Sample:
    return Sample(sample.input, labels[(labels.index(sample.label) + 1) % len(labels)])


def _poisoned(samples: Sequence[Sample], target: str) -> tuple[Sample, ...]:
    """Some samples with a word in front that is to give the target, whatever they say."""
    every = max(1, round(1 / BACKDOOR_SHARE))
    return tuple(
        Sample(f"{TRIGGER} {sample.input}", target) if k % every == 0 else sample for k, sample in enumerate(samples)
    )


def hostile(parts: Parts, attack: str) -> Parts:
    """The parts of a node that attacks. Raises ConfigError for a node that does not learn."""
    if parts.trainer is None:
        raise ConfigError("a node that does not learn can't attack; set learn.enabled")
    return replace(parts, trainer=HostileTrainer(parts.trainer, attack))


def run_changed(folder: Path, change: Callable[[Parts], Parts]) -> None:
    """Run a node with other parts, as `meshnode start` would, until it is told to stop."""
    config = load_config(folder, {})
    log.set_up(level=config.log.level, format=config.log.format)

    async def serve() -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with open_node(config, change=change) as node:
                async for _ in signals:
                    node.leave()
                    break

    trio.run(serve)


def main() -> int:
    """Run a hostile node until it is told to stop; see the top of this file."""
    parser = argparse.ArgumentParser(prog="meshnode.harness.hostile")
    parser.add_argument("attack", choices=tuple(ATTACKS))
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    run_changed(arguments.data, lambda parts: hostile(parts, arguments.attack))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
