"""How fast a device answers while it trains: one engine, one trainer, in turns within one run.

Sides: `alone`, the trainer is stopped since a while; `beside`, it goes on at the lowest priority; `yielding`, it is
stopped when the question comes, as a node does it (services/learning/permission.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from meshnode.bench.lessons import BATCH, TRIALS, frame_for
from meshnode.bench.machine import machine
from meshnode.bench.single import Single
from meshnode.harness.baselines import model_files, samples_of
from meshnode.publisher.quality import sample_tokens
from meshnode.trainer.port import Sample, Schedule, Step, TrainJob
from meshnode.trainer.process import TrainerProcess

Json = dict[str, Any]
PROMPT: Final = 64  # tokens
ALONE, BESIDE, YIELDING = "alone", "beside", "yielding"
SIDES: Final = (ALONE, BESIDE, YIELDING)
# one round: whatever else the machine does meets all sides alike
TURNS: Final = (ALONE, BESIDE, YIELDING, YIELDING, BESIDE, ALONE)
_TASK: Final = "intents"
_FOREVER: Final = 100_000  # steps: training ends with the measurement
_REST_S: Final = 0.5  # between two questions


class _Training:
    """A trainer that works on one job, and what it has done."""

    def __init__(self) -> None:
        self.trainer = TrainerProcess()
        self.steps = 0
        self.begun = trio.Event()

    def report(self, _step: Step) -> None:
        self.steps += 1
        self.begun.set()


def measure(
    published: Path, variant: str, folder: Path, cache: Path, *, rounds: int, tokens: int, say: Callable[[str], None]
) -> Json:
    """Medians of every side, and of what they have beside `alone` within a round. Blocking.

    Args:
      published: a folder that the publisher wrote, with `train` and this variant.
      folder: for files of the task and of the job.
      cache: for downloads.
      tokens: length of each answer.
    """
    trains, _ = TRIALS[_TASK].make(cache, 0).write(folder)
    return trio.run(partial(_measure, published, variant, samples_of(trains[0]), folder, rounds, tokens, say))


async def _measure(
    published: Path,
    variant: str,
    samples: tuple[Sample, ...],
    folder: Path,
    rounds: int,
    tokens: int,
    say: Callable[[str], None],
) -> Json:
    frame, training = frame_for(published, TRIALS[_TASK].targets, 0), _Training()
    job = TrainJob(
        folder=folder / "job",
        model=model_files(published, frame.base),
        frame=frame,
        start=frame.initial(),
        samples=samples,
        steps=_FOREVER,
        schedule=Schedule(rate=1e-4, total=_FOREVER),
        batch=BATCH,
    )
    text = sample_tokens(published / "tokenizer.json", PROMPT + rounds)
    single = Single(published, variant)
    found: dict[str, dict[str, list[float]]] = {side: {"tok_s": [], "ttft_ms": []} for side in SIDES}
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(training.trainer.train, job, training.report)
            await training.begun.wait()
            for number in range(rounds):
                prompt = text[number : number + PROMPT]
                given: dict[str, list[Json]] = {side: [] for side in SIDES}
                for side in TURNS:
                    given[side].append(await _answer(single, training.trainer, side, prompt, tokens))
                for side, answers in given.items():
                    found[side]["tok_s"].append(statistics.mean(one["decode_tok_s"] for one in answers))
                    found[side]["ttft_ms"].append(statistics.mean(one["ttft_ms"] for one in answers))
                last = ", ".join(f"{side} {of['tok_s'][-1]:.1f}" for side, of in found.items())
                say(f"round {number + 1}: {last} tok/s; {training.steps} steps trained")
            nursery.cancel_scope.cancel()
    finally:
        single.stop()
        await training.trainer.aclose()
    return {
        "variant": variant,
        "steps_trained": training.steps,
        **{
            side: {name: round(statistics.median(values), 2) for name, values in of.items()}
            for side, of in found.items()
        },
        **{f"{side}_ratio": round(_ratio(found, side), 4) for side in (BESIDE, YIELDING)},
        **{f"{side}_later_ms": round(_later(found, side), 2) for side in (BESIDE, YIELDING)},
        "rounds": found,
        "machine": machine(),
    }


async def _answer(single: Single, trainer: TrainerProcess, side: str, prompt: list[int], tokens: int) -> Json:
    if side == ALONE:
        trainer.pause()
    else:
        trainer.resume()
    await trio.sleep(_REST_S)
    if side == YIELDING:
        trainer.pause()
    return await trio.to_thread.run_sync(single.generate, prompt, tokens)


def _ratio(found: dict[str, dict[str, list[float]]], side: str) -> float:
    """Decode speed, as a part of that alone."""
    pairs = zip(found[ALONE]["tok_s"], found[side]["tok_s"], strict=True)
    return statistics.median(other / alone for alone, other in pairs)


def _later(found: dict[str, dict[str, list[float]]], side: str) -> float:
    """How much later the first token is there, in milliseconds."""
    pairs = zip(found[ALONE]["ttft_ms"], found[side]["ttft_ms"], strict=True)
    return statistics.median(other - alone for alone, other in pairs)
