"""How good a candidate is beside what it is to replace: both on samples of the suite that were drawn for us."""

from __future__ import annotations

import platform
import random
from contextlib import ExitStack
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Final

import numpy as np

from meshnode.core.errors import ModelError
from meshnode.services.learning.adapters import read_adapter
from meshnode.services.learning.ground import Ground
from meshnode.services.learning.lessons import SuiteLine
from meshnode.services.learning.service import School
from meshnode.services.learning.worker import HIDDEN, open_model
from meshnode.services.port import Comparison
from meshnode.trainer.port import EvaluateJob, ModelFiles, Sample
from protocols.delta.frame import Frame, Vector
from protocols.ids import Cid
from protocols.rollout.messages import Candidate

DRAWN: Final = 256  # samples of one vote, or all of a smaller suite


@dataclass(frozen=True, slots=True)
class _Adapter:
    frame: Frame
    vector: Vector | None  # None: the bare model


async def compare(
    ground: Ground, school: School, suite: tuple[SuiteLine, ...], candidate: Candidate, seed: int
) -> Comparison:
    """See `Judge` of services/port.py. Raises what fetching and the trainer raise, and ModelError."""
    drawn = sorted(random.Random(seed).sample(range(len(suite)), min(DRAWN, len(suite))))
    samples = tuple(Sample(suite[i].input, suite[i].label) for i in drawn)
    labels = tuple(sorted({line.label for line in suite}))
    with ExitStack() as opened:
        model = await open_model(ground.content, Cid(candidate.base), opened)
        new = _Adapter(*await read_adapter(ground.content, ground.workers, Cid(candidate.adapter)))
        old = _Adapter(new.frame, None)
        if candidate.previous:
            old = _Adapter(*await read_adapter(ground.content, ground.workers, Cid(candidate.previous)))
        if new.frame.base != candidate.base or old.frame.base != candidate.base:
            raise ModelError(f"The candidate {candidate.version} names adapters of another model.")
        jobs = [_job(model, school.folder, (new, old), samples, labels)]
        if old.frame != new.frame:
            jobs = [_job(model, school.folder, (one,), samples, labels) for one in (new, old)]
        found = [one for job in jobs for one in await school.trainer.evaluate(job)]
    worse = found[0].losses.astype(np.float64) - found[1].losses
    return Comparison(
        samples=len(samples),
        loss_new=found[0].loss,
        loss_old=found[1].loss,
        ci95=1.96 * float(worse.std(ddof=1)) / sqrt(len(worse)) if len(worse) > 1 else 0.0,
        hardware=platform.machine(),
    )


def _job(
    model: ModelFiles,
    folder: Path,
    adapters: tuple[_Adapter, ...],
    samples: tuple[Sample, ...],
    labels: tuple[str, ...],
) -> EvaluateJob:
    frame = adapters[0].frame
    return EvaluateJob(
        model=model,
        frame=frame,
        adapters=tuple(one.vector for one in adapters),
        samples=samples,
        labels=labels,
        cache=folder / frame.cid / HIDDEN,
    )
