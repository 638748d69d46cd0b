"""The trainer at work for one lesson: jobs on this device's samples, and judging on the suite."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshnode.core.errors import ModelError
from meshnode.core.workers import Workers
from meshnode.policy import gate
from meshnode.services.learning.lessons import SuiteLine
from meshnode.services.learning.privacy import Terms
from meshnode.services.learning.service import School
from meshnode.services.port import Content
from meshnode.state.samples_port import Sample as Kept
from meshnode.trainer.port import EvaluateJob, ModelFiles, Privacy, Sample, Schedule, Step, Trained, TrainJob
from protocols.delta.frame import Frame, Vector
from protocols.errors import RemoteProtocolError
from protocols.ids import Cid
from protocols.lesson.messages import Lesson
from protocols.manifest.codec import open_manifest
from protocols.manifest.messages import TRAIN, FileRef, Manifest

MOST_SAMPLES: Final = 4096  # of one job
HIDDEN: Final = "hidden"  # folder of hidden states, which tell about the samples


@dataclass(frozen=True, slots=True)
class Study:
    """A lesson with all that it names at hand."""

    cid: Cid
    lesson: Lesson
    frame: Frame
    suite: tuple[SuiteLine, ...]

    @property
    def held_out(self) -> frozenset[tuple[str, str]]:
        return frozenset((line.input, line.label) for line in self.suite)


@dataclass(frozen=True, slots=True)
class Round:
    """What the steps of a round have come to."""

    trained: Trained
    samples: int  # that they were drawn from
    terms: Terms | None  # of differential privacy


async def open_model(content: Content, base: Cid, opened: ExitStack) -> ModelFiles:
    """Every file of a release's variant `train`, fetched and open until `opened` ends.

    Raises ContentUnavailable, ModelError (it was published without this variant, or is no model), DiskError.
    """
    try:
        manifest = open_manifest(await content.block(base))
    except RemoteProtocolError as error:
        raise ModelError(f"The release {base} that the lesson names can't be used: {error}") from error
    variant = manifest.variants.get(TRAIN)
    if variant is None:
        raise ModelError(
            f"{manifest.name} was published without the variant {TRAIN}, which learning needs. Add it on a node that "
            f"may publish: meshnode model add ... --variant {TRAIN}"
        )

    async def path(ref: FileRef) -> Path:
        return opened.enter_context(await content.open(ref))

    return ModelFiles(
        name=base,
        config=await path(_shared(manifest, "config.json")),
        tokenizer=await path(_shared(manifest, "tokenizer.json")),
        index=await path(variant.graph),
        groups={name: await path(ref) for name, ref in variant.groups(0, len(variant.layers)).items()},
    )


def _shared(manifest: Manifest, name: str) -> FileRef:
    ref = manifest.files.get(name)
    if ref is None:
        raise ModelError(f"{manifest.name} was published without {name}, which learning needs.")
    return ref


class Worker:
    """Trains and judges the adapters of one lesson."""

    def __init__(self, school: School, model: ModelFiles, study: Study, folder: Path, workers: Workers) -> None:
        """`folder`: of the lineage; hidden states are kept there."""
        self._trainer = school.trainer
        self._buffer = school.samples
        self._private = school.private
        self._model = model
        self._study = study
        self._folder = folder
        self._workers = workers
        self._ordinary = study.lesson.steps or school.rhythm.steps  # steps of a round
        self._labels = tuple(sorted({line.label for line in study.suite}))

    async def train(
        self,
        round_number: int,
        start: Vector,
        steps: int,
        done: int,
        optimiser: str,
        folder: Path,
        report: Callable[[Step], None],
    ) -> Round:
        """The steps of one round.

        Args:
          steps: of this round.
          done: steps of this lesson before.
          folder: of the job.

        Raises what the trainer raises; Declined `privacy-spent` when the owner's budget does not allow them.
        """
        lesson, frame = self._study.lesson, self._study.frame
        chosen = sorted(self._chosen(), key=lambda sample: sample.id)
        terms = None
        if self._private is not None:
            plan = await self._workers.run(self._private.plan, len(chosen), lesson.batch, steps)
            terms = self._private.reserve(plan)
        self._buffer.note_use([sample.id for sample in chosen], frame.cid, round_number)
        job = TrainJob(
            folder=folder,
            model=self._model,
            frame=frame,
            start=start,
            samples=tuple(Sample(sample.input, sample.label) for sample in chosen),
            steps=steps,
            schedule=Schedule(rate=lesson.rate_micro / 1e6, total=self._ordinary * lesson.rounds, done=done),
            optimiser=Path(optimiser) if optimiser else None,
            factors=frame.trained(round_number),
            batch=lesson.batch,
            privacy=None if terms is None else Privacy(clip=terms.clip, sigma=terms.sigma),
            seed=frame.seed,
            cache=self._folder / HIDDEN,
        )
        return Round(await self._trainer.train(job, report), len(chosen), terms)

    @property
    def fresh(self) -> int:
        """Samples that no round has trained on."""
        return self._buffer.summary().fresh

    def _chosen(self) -> Sequence[Kept]:
        """What to train on, never a sample of the suite. Private steps draw from all samples, whatever they teach."""
        held_out = self._study.held_out
        if self._private is None:
            return self._buffer.select(MOST_SAMPLES, self._study.frame.seed, held_out)
        every = self._buffer.draw(1.0, random.SystemRandom())
        return [sample for sample in every if (sample.input, sample.label) not in held_out]

    async def judge(self, own: Vector, mix: Vector, delta: Cid, round_number: int) -> gate.Verdict:
        """What a mix with another's delta would do to us, on the samples that judge it. Raises as `train`."""
        suite = self._study.suite
        drawn = gate.draw([line.label for line in suite], delta, round_number, self._study.lesson.gate)
        found = await self._trainer.evaluate(
            EvaluateJob(
                model=self._model,
                frame=self._study.frame,
                adapters=(own, mix),
                samples=tuple(Sample(suite[i].input, suite[i].label) for i in drawn),
                labels=self._labels,
                cache=self._folder / HIDDEN,
            )
        )
        return gate.judge([suite[i].label for i in drawn], *(one.losses.tolist() for one in found))
