"""What learning together is compared with: each node alone, and the mean of all after each round (FedAvg).

The trainer does the same jobs as in the nodes, without any mesh: equal samples, steps, batches and rates. FedAvg:
McMahan et al., arXiv 1602.05629, with the moments of the optimiser kept on each node.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import trio

from meshnode.core.errors import ModelError
from meshnode.harness.tasks import read_examples
from meshnode.trainer.port import EvaluateJob, ModelFiles, Sample, Schedule, TrainJob
from meshnode.trainer.process import TrainerProcess
from protocols.delta.frame import Frame, Vector
from protocols.ids import Cid
from protocols.manifest.messages import TRAIN

TOGETHER: Final = 2  # trainers at a time: cores of a small machine

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A lesson as the trainer sees it."""

    frame: Frame
    model: ModelFiles
    rounds: int
    steps: int
    batch: int
    rate: float


@dataclass(frozen=True, slots=True)
class Judged:
    """An adapter on the held-out samples."""

    accuracy: float
    loss: float


def model_files(published: Path, base: Cid) -> ModelFiles:
    """The variant `train` in a folder that the publisher wrote. Raises ModelError."""
    try:
        index = json.loads((published / "index.json").read_text(encoding="utf-8"))
        variant: dict[str, Any] = index["variants"][TRAIN]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{published} holds no published variant {TRAIN}: {error!r}") from error
    groups = {f"layer.{k}": published / ref["path"] for k, ref in enumerate(variant["layers"])}
    return ModelFiles(
        name=base,
        config=published / "config.json",
        tokenizer=published / "tokenizer.json",
        index=published / variant["graph"]["path"],
        groups={name: published / variant[name]["path"] for name in ("embed", "head")} | groups,
    )


def samples_of(path: Path) -> tuple[Sample, ...]:
    """The lines of a file. Raises ModelError."""
    return tuple(Sample(input_, label) for input_, label in read_examples(path))


class Baselines:
    """Trains without a mesh. Its methods block."""

    def __init__(self, course: Course, trains: Sequence[Path], folder: Path, caches: Sequence[Path | None]) -> None:
        """
        Args:
          trains: samples of each node.
          folder: for the jobs.
          caches: hidden states that each node has kept; None: nothing.
        """
        self._course = course
        self._samples = [samples_of(path) for path in trains]
        self._folder = folder
        self._caches = caches

    def alone(self) -> list[Vector]:
        """The adapter that each node reaches by itself."""
        total = self._course.rounds * self._course.steps

        async def one(trainer: TrainerProcess, node: int) -> Vector:
            job = self._job(node, self._folder / f"alone-{node}", self._course.frame.initial(), total, 0, None)
            return (await trainer.train(job)).vector

        return trio.run(self._each, one)

    def averaged(self) -> Vector:
        """The adapter of FedAvg."""
        return trio.run(self._fedavg)

    def judge(self, vectors: Sequence[Vector | None], heldout: Path) -> list[Judged]:
        """Each of them on the held-out samples; None is the bare model."""
        samples = samples_of(heldout)

        async def some(trainer: TrainerProcess, share: int) -> list[Judged]:
            mine = vectors[share::TOGETHER]
            if not mine:
                return []
            job = EvaluateJob(
                model=self._course.model,
                frame=self._course.frame,
                adapters=tuple(mine),
                samples=samples,
                cache=self._folder / f"judge-{share}",
            )
            return [Judged(one.accuracy, one.loss) for one in await trainer.evaluate(job)]

        async def work() -> list[list[Judged]]:
            return await _shared(range(TOGETHER), some)

        shares = trio.run(work)
        return [shares[k % TOGETHER][k // TOGETHER] for k in range(len(vectors))]

    async def _each(self, work: Callable[[TrainerProcess, int], Awaitable[Vector]]) -> list[Vector]:
        return await _shared(range(len(self._samples)), work)

    async def _fedavg(self) -> Vector:
        course, mean = self._course, self._course.frame.initial()
        optimisers: list[Path | None] = [None] * len(self._samples)
        trainers = [TrainerProcess() for _ in range(TOGETHER)]
        try:
            for number in range(1, course.rounds + 1):
                reached: dict[int, Vector] = {}

                async def some(
                    share: int, start: Vector = mean, number: int = number, reached: dict[int, Vector] = reached
                ) -> None:
                    for node in range(share, len(self._samples), TOGETHER):
                        folder = self._folder / f"fedavg-{node}" / str(number)
                        job = self._job(node, folder, start, course.steps, number - 1, optimisers[node], number)
                        done = await trainers[share].train(job)
                        reached[node], optimisers[node] = done.vector, done.optimiser

                async with trio.open_nursery() as nursery:
                    for share in range(TOGETHER):
                        nursery.start_soon(some, share)
                total = sum(reached[node].astype(np.float64) for node in sorted(reached))
                mean = np.asarray(total / len(reached), np.float32)
        finally:
            for trainer in trainers:
                await trainer.aclose()
        return mean

    def _job(
        self,
        node: int,
        folder: Path,
        start: Vector,
        steps: int,
        before: int,
        optimiser: Path | None,
        number: int = 1,
    ) -> TrainJob:
        """`before`: rounds that are done; `number`: the round, whose turn some factors may be."""
        course = self._course
        return TrainJob(
            folder=folder,
            model=course.model,
            frame=course.frame,
            start=start,
            samples=self._samples[node],
            steps=steps,
            schedule=Schedule(rate=course.rate, total=course.rounds * course.steps, done=before * course.steps),
            optimiser=optimiser,
            factors=course.frame.trained(number),
            batch=course.batch,
            seed=course.frame.seed,
            cache=self._caches[node],
        )


async def _shared(items: Sequence[int], work: Callable[[TrainerProcess, int], Awaitable[Result]]) -> list[Result]:
    """Work on every item, by TOGETHER trainers at a time."""
    results: dict[int, Result] = {}

    async def some(share: int) -> None:
        trainer = TrainerProcess()
        try:
            for item in items[share::TOGETHER]:
                results[item] = await work(trainer, item)
        finally:
            await trainer.aclose()

    async with trio.open_nursery() as nursery:
        for share in range(TOGETHER):
            nursery.start_soon(some, share)
    return [results[item] for item in items]
