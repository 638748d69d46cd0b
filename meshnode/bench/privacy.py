"""What private training costs, and what adapters tell about the samples that they were trained on.

Two trainers do equal steps on the same samples, one of them with clipped gradients and noise (DP-SGD). Then two
attacks guess from the loss of each sample whether it was trained on (Yeom et al., arXiv 1709.01604): from its loss
alone, and from how much the adapter has lowered it (Watson et al., arXiv 2111.08440). The area under the curve of
hits over false alarms is the chance that a sample that was trained on looks more like one than a sample that was
not: 0.5 is guessing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio

from meshnode.bench.lessons import TRIALS, frame_for
from meshnode.bench.machine import machine
from meshnode.harness.baselines import model_files
from meshnode.harness.tasks import fetch_intents, read_intents
from meshnode.policy.accountant import noise_for
from meshnode.trainer.port import EvaluateJob, Privacy, Sample, Schedule, TrainJob
from meshnode.trainer.process import TrainerProcess

Json = dict[str, Any]
MEMBERS: Final = 800  # samples that are trained on
OTHERS: Final = 280  # that are not, and as many members whose losses are compared with theirs
HELD_OUT: Final = 280
BATCH: Final = 32
CLIP: Final = 1.0
DELTA: Final = 1e-5
PLAIN, PRIVATE = "plain", "private"
_PROMPT: Final = "Request: {}\nIntent:"


def measure(
    published: Path, folder: Path, cache: Path, *, epsilon: float, steps: int, rate: float, say: Callable[[str], None]
) -> Json:
    """Accuracy on held-out samples, and how well both attacks do. Blocking.

    Args:
      published: a folder that the publisher wrote, with the variant `train`.
      folder: for jobs and hidden states.
      cache: for downloads.
      rate: of learning.
    """
    sigma = noise_for(epsilon, DELTA, BATCH / MEMBERS, steps)
    say(f"epsilon {epsilon:g} at delta {DELTA:g} for {steps} steps: noise {sigma:.3f} times the clipping norm")
    parts = {name: _samples(examples) for name, examples in read_intents(fetch_intents(cache)).items()}
    drawn, heldout = parts["train"][: MEMBERS + OTHERS], parts["test"][:HELD_OUT]
    members, others = drawn[:MEMBERS], drawn[MEMBERS:]
    found: dict[str, Json] = {}
    frame = frame_for(published, TRIALS["intents"].targets, 0)
    model = model_files(published, frame.base)

    async def one(kind: str, privacy: Privacy | None) -> None:
        trainer = TrainerProcess()
        try:
            job = TrainJob(
                folder=folder / kind,
                model=model,
                frame=frame,
                start=frame.initial(),
                samples=members,
                steps=steps,
                schedule=Schedule(rate=rate, total=steps),
                batch=BATCH,
                privacy=privacy,
                cache=folder / f"hidden-{kind}",
            )
            trained = await trainer.train(job)
            say(f"{kind}: trained in {trained.seconds:.0f} s")
            compared = members[:OTHERS] + others
            judge = partial(
                EvaluateJob,
                model=model,
                frame=frame,
                labels=tuple(sorted({sample.label for sample in drawn})),
                cache=folder / f"hidden-{kind}",
            )
            (right,) = await trainer.evaluate(judge(adapters=(trained.vector,), samples=heldout))
            before, after = await trainer.evaluate(judge(adapters=(None, trained.vector), samples=compared))
        finally:
            await trainer.aclose()
        found[kind] = {
            "accuracy": round(right.accuracy, 4),
            "loss": round(right.loss, 4),
            "members_loss": round(float(after.losses[:OTHERS].mean()), 4),
            "others_loss": round(float(after.losses[OTHERS:].mean()), 4),
            "loss_auc": round(area(-after.losses[:OTHERS], -after.losses[OTHERS:]), 4),
            "change_auc": round(area(*np.split(before.losses - after.losses, [OTHERS])), 4),
        }
        say(f"{kind}: {found[kind]}")

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, PLAIN, None)
            nursery.start_soon(one, PRIVATE, Privacy(clip=CLIP, sigma=sigma))

    trio.run(both)
    return {
        "epsilon": epsilon,
        "delta": DELTA,
        "sigma": round(sigma, 4),
        "clip": CLIP,
        "batch": BATCH,
        "steps": steps,
        "rate": rate,
        "members": len(members),
        **found,
        "machine": machine(),
    }


def _samples(examples: Sequence[tuple[str, str]]) -> tuple[Sample, ...]:
    """Each text once, in an order by chance."""
    distinct = sorted(dict(examples).items())
    random.Random(0).shuffle(distinct)
    return tuple(Sample(_PROMPT.format(text), label) for text, label in distinct)


def area(members: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> float:
    """The chance that a member's score is above another one's; ties count half."""
    difference = members[:, None] - others[None, :]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)
