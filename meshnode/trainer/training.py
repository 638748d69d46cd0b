"""The steps of a job. Runs in the trainer only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from meshnode.core.errors import BadRequest
from meshnode.trainer.adapted import AdaptedModel
from meshnode.trainer.checkpoint import Checkpoint, read_checkpoint, read_optimiser, write_checkpoint
from meshnode.trainer.gradient import gradient_of
from meshnode.trainer.optimiser import AdamW
from meshnode.trainer.port import Step, TrainJob
from meshnode.trainer.private import clipped_sum, drawn, noise
from meshnode.trainer.texts import Row

STATE: Final = "state.safetensors"  # of a job, in its folder


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is in the job's file STATE at its end, and how it came to be."""

    losses: list[float]
    seconds: float
    resumed: int  # steps that had been done before


def train(
    model: AdaptedModel, job: TrainJob, identity: str, rows: Sequence[Row], report: Callable[[Step], None]
) -> Outcome:
    """Do the steps of a job that are not done yet.

    Args:
      identity: of the job: a file STATE of another one is not gone on with.
      rows: its samples.

    Raises BadRequest (a private batch larger than all samples, moments of another size), DiskError.
    """
    places = _places(model)
    moving = [name for name in places if name.rpartition(".")[2] in job.factors]
    if not moving:
        raise BadRequest(f"A job of training moves A, B or both, not {job.factors!r}.")
    if job.privacy is not None and job.batch > len(rows):
        raise BadRequest(f"A private batch of {job.batch} needs as many samples; there are {len(rows)}.")
    run = _Run(model, job, identity, places, moving)
    path = job.folder / STATE
    state = read_checkpoint(path)
    if state is not None and state.facts.get("job") == identity:
        run.restore(state)
    else:
        run.begin()
    resumed = len(run.losses)
    run.save(path)
    while len(run.losses) < job.steps:
        report(run.step(rows))
        run.save(path)
    return Outcome(run.losses, run.seconds, resumed)


class _Run:
    """A job between two of its steps."""

    def __init__(
        self, model: AdaptedModel, job: TrainJob, identity: str, places: dict[str, slice], moving: list[str]
    ) -> None:
        self.losses: list[float] = []
        self.seconds = 0.0
        self._model = model
        self._job = job
        self._identity = identity
        self._moving = {name: places[name] for name in moving}
        empty = torch.zeros_like(model.vector)
        self._optimiser = AdamW(places, empty, empty.clone(), {}, job.weight_decay)

    def begin(self) -> None:
        self._model.set(self._job.start)
        if self._job.optimiser is not None:
            found = read_optimiser(self._job.optimiser, len(self._model.vector))
            self._take_moments(found)

    def restore(self, state: Checkpoint) -> None:
        self._model.set(state.tensors["vector"].numpy())
        self._take_moments(state)
        self.losses = [math.nan if loss is None else loss for loss in state.facts["losses"]]
        self.seconds = state.facts["seconds"]

    def save(self, path: Path) -> None:
        tensors = {"vector": self._model.vector, "first": self._optimiser.first, "second": self._optimiser.second}
        facts = {
            "job": self._identity,
            "moved": self._optimiser.steps,
            "losses": [None if math.isnan(loss) else loss for loss in self.losses],
            "seconds": self.seconds,
        }
        write_checkpoint(path, Checkpoint(tensors, facts))

    def step(self, rows: Sequence[Row]) -> Step:
        """Raises BadRequest when it leads nowhere."""
        begin = time.perf_counter()
        number = len(self.losses)
        gradient, loss = self._private(rows) if self._job.privacy is not None else self._plain(rows, number)
        rate = self._job.schedule.at(number)
        self._optimiser.step(self._model.vector, gradient, rate, self._moving)
        if not bool(torch.isfinite(self._model.vector).all()):
            raise BadRequest(
                f"Step {number + 1} led to values that are no numbers (loss {loss:g}, rate {rate:g}). Train with a "
                "lower rate; what was reached before is kept."
            )
        seconds = time.perf_counter() - begin
        self.losses.append(loss)
        self.seconds += seconds
        return Step(number + 1, loss, seconds)

    def _plain(self, rows: Sequence[Row], number: int) -> tuple[torch.Tensor, float]:
        job = self._job
        batch = [rows[i] for i in batch_of(len(rows), job.batch, job.seed, job.schedule.done + number)]
        return gradient_of(self._model, batch, self._moving)

    def _private(self, rows: Sequence[Row]) -> tuple[torch.Tensor, float]:
        privacy, batch = self._job.privacy, self._job.batch
        assert privacy is not None
        chosen = [rows[i] for i in drawn(len(rows), batch / len(rows))]
        gradient, losses = clipped_sum(self._model, chosen, self._moving, privacy)
        gradient += noise(len(gradient), privacy.sigma * privacy.clip)
        return gradient / batch, float(np.mean(losses)) if losses else math.nan

    def _take_moments(self, state: Checkpoint) -> None:
        self._optimiser.first.copy_(state.tensors["first"])
        self._optimiser.second.copy_(state.tensors["second"])
        self._optimiser.steps.update(state.facts["moved"])


def batch_of(samples: int, batch: int, seed: int, step: int) -> list[int]:
    """The indices of a step's batch: all samples in an order by chance, then all in another one, and so on."""
    places = range(step * batch, (step + 1) * batch)
    orders = {at // samples: None for at in places}
    shuffled = {epoch: np.random.default_rng([seed, epoch]).permutation(samples) for epoch in orders}
    return [int(shuffled[at // samples][at % samples]) for at in places]


def _places(model: AdaptedModel) -> dict[str, slice]:
    places, at = {}, 0
    for name, factor in model.factors.items():
        places[name] = slice(at, at + factor.numel())
        at += factor.numel()
    return places
