"""A trainer without torch and without a model: a logistic regression whose weights are a frame's vector itself.

The score of a label is the sum over the words of a text of one weight each, which the hash of word and label chooses;
unknown labels compete, as the rest of a vocabulary does. What the mesh does with vectors (rounds, mixing, votes,
hostile peers) can be tried with it in milliseconds and in virtual time, on the same samples and with the same
schedule. It stands for a language model in nothing else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio
from numpy.typing import NDArray

from meshnode.core.errors import BadRequest
from meshnode.trainer.port import (
    EvaluateJob,
    Evaluation,
    LocalJob,
    Report,
    Sample,
    Step,
    Trained,
    TrainedLocally,
    TrainJob,
)
from protocols.delta.frame import Frame

_SCALE: Final = 40.0  # of the scores: as many steps are needed as with SmolLM2
_STRANGERS: Final = tuple(f"\0{k}" for k in range(16))  # labels that no sample has
_WORD: Final = re.compile(r"\w+")
_MOMENTS: Final = "moments.npz"

Values = NDArray[np.float64]
Places = NDArray[np.int64]


def _ignore(_step: Step) -> None: ...


class SimTrainer:
    """Implements `Trainer` (trainer/port.py). A job takes no time; paused, it waits before its next step.

    Private noise comes from the job's seed, so that a simulation can be repeated: this is no place for real data.
    """

    def __init__(self) -> None:
        self._running = trio.Event()
        self._running.set()

    async def train(self, job: TrainJob, report: Report = _ignore) -> Trained:
        """See port.py. A job that was interrupted is begun anew."""
        kept = [sample for sample in job.samples if len(_words(sample.input)) + 1 <= job.max_tokens]
        if not kept or job.start.shape != (job.frame.parameters,):
            raise BadRequest("Training needs samples that are short enough, and a vector of the frame.")
        state = _State(job)
        losses = []
        for k in range(job.steps):
            await self._running.wait()
            await trio.lowlevel.checkpoint()
            losses.append(state.step(kept, k))
            report(Step(k + 1, losses[-1], 0.0))
        job.folder.mkdir(parents=True, exist_ok=True)
        return Trained(
            vector=state.vector.astype(np.float32),
            optimiser=state.save(job.folder / _MOMENTS),
            losses=tuple(losses),
            seconds=0.0,
            skipped=len(job.samples) - len(kept),
            resumed=0,
        )

    async def train_locally(self, job: LocalJob, report: Report = _ignore) -> TrainedLocally:
        """There are no other methods here: BadRequest."""
        await trio.lowlevel.checkpoint()
        raise BadRequest(f"A trainer without a model has no method {job.method!r}.")

    async def evaluate(self, job: EvaluateJob) -> tuple[Evaluation, ...]:
        """See port.py."""
        await self._running.wait()
        await trio.lowlevel.checkpoint()
        labels = job.labels or tuple(sorted({sample.label for sample in job.samples}))
        if not job.samples or {sample.label for sample in job.samples} - set(labels):
            raise BadRequest("Judging needs samples, each with one of the labels.")
        right = np.array([labels.index(sample.label) for sample in job.samples])
        return tuple(_judged(job, adapter, labels, right) for adapter in job.adapters)

    def pause(self) -> None:
        """See port.py."""
        if self._running.is_set():
            self._running = trio.Event()

    def resume(self) -> None:
        """See port.py."""
        self._running.set()

    @property
    def paused(self) -> bool:
        return not self._running.is_set()

    @property
    def rss_bytes(self) -> int:
        return 0

    async def aclose(self) -> None:
        """See port.py."""
        await trio.lowlevel.checkpoint()


class _State:
    """A job between two of its steps: AdamW over the vector."""

    def __init__(self, job: TrainJob) -> None:
        self._job = job
        self.vector: Values = job.start.astype(np.float64)
        self._origin = _initial(job.frame)
        self._moves = np.zeros(len(self.vector), bool)
        for name, part in zip((n for n, _ in job.frame.tensors), _parts(job.frame), strict=True):
            self._moves[part] = name.rpartition(".")[2] in job.factors
        self._m, self._v = (np.zeros_like(self.vector) for _ in range(2))
        self._count = 0
        if job.optimiser is not None:
            with np.load(job.optimiser) as kept:
                self._m, self._v, self._count = kept["m"], kept["v"], int(kept["count"])

    def step(self, samples: Sequence[Sample], number: int) -> float:
        """One step; gives the loss before it."""
        job = self._job
        chance = np.random.default_rng([job.seed, job.schedule.done + number])
        chosen = [samples[int(i)] for i in chance.integers(0, len(samples), job.batch)]
        slopes = [_slope(self.vector - self._origin, sample, _labels(samples)) for sample in chosen]
        total = np.zeros_like(self.vector)
        for slope, _ in slopes:
            total += _clipped(slope * self._moves, job)
        if job.privacy is not None:
            total += chance.normal(0, job.privacy.sigma * job.privacy.clip, len(total)) * self._moves
        total /= job.batch
        self._count += 1
        self._m = 0.9 * self._m + 0.1 * total
        self._v = 0.999 * self._v + 0.001 * total**2
        divisor = np.sqrt(self._v / (1 - 0.999**self._count)) + 1e-8
        move = self._m / (1 - 0.9**self._count) / divisor + job.weight_decay * self.vector
        self.vector -= job.schedule.at(number) * move * self._moves
        return float(np.mean([loss for _, loss in slopes]))

    def save(self, path: Path) -> Path:
        with path.open("wb") as file:
            np.savez(file, m=self._m, v=self._v, count=np.int64(self._count))
        return path


def _clipped(slope: Values, job: TrainJob) -> Values:
    if job.privacy is None:
        return slope
    return slope * min(1.0, job.privacy.clip / max(float(np.linalg.norm(slope)), 1e-12))


def _slope(weights: Values, sample: Sample, labels: tuple[str, ...]) -> tuple[Values, float]:
    """Gradient of one sample's loss, and the loss."""
    places = _places(sample.input, labels, len(weights))
    scale = _SCALE / np.sqrt(places.shape[1])
    likely = _log_softmax(scale * weights[places].sum(axis=1))
    right = labels.index(sample.label)
    error = np.exp(likely)
    error[right] -= 1
    slope = np.zeros_like(weights)
    np.add.at(slope, places, scale * error[:, None])
    return slope, -float(likely[right])


def _judged(job: EvaluateJob, adapter: Any, labels: tuple[str, ...], right: Places) -> Evaluation:
    if isinstance(adapter, Path):
        raise BadRequest(f"{adapter} holds no adapter for this model.")
    origin = _initial(job.frame)
    weights = origin - origin if adapter is None else adapter.astype(np.float64) - origin
    every = (*labels, *_STRANGERS)
    rows = []
    for sample in job.samples:
        places = _places(sample.input, every, len(weights))
        rows.append(_log_softmax(_SCALE / np.sqrt(places.shape[1]) * weights[places].sum(axis=1))[: len(labels)])
    scores = np.stack(rows)
    return Evaluation(
        labels=labels,
        losses=-scores[np.arange(len(right)), right].astype(np.float32),
        scores=scores.astype(np.float32),
        right=scores.argmax(axis=1) == right,
    )


def _labels(samples: Sequence[Sample]) -> tuple[str, ...]:
    return (*sorted({sample.label for sample in samples}), *_STRANGERS)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower()) or [""]


@lru_cache(maxsize=1 << 16)
def _places(text: str, labels: tuple[str, ...], size: int) -> Places:
    """Which weights count: int64 [labels, words]."""
    words = _words(text)
    return np.array([[_hash(f"{label}\0{word}") % size for word in words] for label in labels])


@lru_cache(maxsize=1 << 16)
def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@lru_cache(maxsize=8)
def _initial(frame: Frame) -> Values:
    return frame.initial().astype(np.float64)


def _parts(frame: Frame) -> list[slice]:
    parts, at = [], 0
    for _, (height, width) in frame.tensors:
        parts.append(slice(at, at + height * width))
        at += height * width
    return parts


def _log_softmax(scores: Values) -> Values:
    shifted = scores - scores.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
