"""Which factors of an adapter are trained: both at once, in turns or B alone, at equal steps on real tasks.

Four nodes with samples of their own, the exact mean of their vectors after each round (FedAvg) and the real trainer,
without a mesh: nothing but the factors differs. Factors in turns are RoLoRA's way (arXiv 2502.01755), B alone is
FFA-LoRA's (arXiv 2403.12313): the mean of products is not the product of means.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshnode.bench.lessons import BATCH, TRIALS, Trial, frame_for
from meshnode.bench.machine import machine
from meshnode.harness.baselines import Baselines, Course, Judged, model_files
from protocols.delta.frame import FACTORS, Vector

Json = dict[str, Any]
Say = Callable[[str], None]


def measure(published: Path, task: str, seeds: Sequence[int], folder: Path, cache: Path, say: Say) -> Json:
    """Accuracy and loss on the held-out samples, for each seed and for all. Blocking.

    Args:
      published: a folder that the publisher wrote, with the variant `train`.
      folder: for files, adapters and hidden states; adapters stay there.
      cache: for downloads.
    """
    trial = TRIALS[task]
    runs = [_seed(published, trial, seed, folder / f"{task}-{seed}", cache, say) for seed in seeds]
    return {
        "task": task,
        "rounds": trial.rounds,
        "steps": trial.steps,
        "rate": trial.rate,
        "seeds": list(seeds),
        "bare": _middle([run["bare"] for run in runs]),
        **{kind: _middle([run[kind] for run in runs]) for kind in FACTORS},
        "runs": runs,
        "machine": machine(),
    }


def _seed(published: Path, trial: Trial, seed: int, folder: Path, cache: Path, say: Say) -> Json:
    trains, heldout = trial.make(cache, seed).write(folder)
    caches = [folder / f"hidden-{node}" for node in range(len(trains))]
    reached: list[Vector] = []
    seconds: list[float] = []
    for kind in FACTORS:
        frame = frame_for(published, trial.targets, seed, kind)
        course = Course(
            frame=frame,
            model=model_files(published, frame.base),
            rounds=trial.rounds,
            steps=trial.steps,
            batch=BATCH,
            rate=trial.rate,
        )
        jobs = folder / "jobs"
        shutil.rmtree(jobs, ignore_errors=True)
        learners = Baselines(course, trains, jobs, caches)
        began = time.monotonic()
        reached.append(learners.averaged())
        seconds.append(time.monotonic() - began)
        np.save(folder / f"{kind}.npy", reached[-1])
        say(f"seed {seed}, {kind}: trained in {seconds[-1]:.0f} s")
    bare, *judged = learners.judge([None, *reached], heldout)
    found = {
        kind: {**_plain(one), "seconds": round(s)} for kind, one, s in zip(FACTORS, judged, seconds, strict=True)
    }
    say(f"seed {seed}: bare {_plain(bare)}, {found}")
    return {"seed": seed, "parameters": frame.parameters, "bare": _plain(bare), **found}


def _plain(judged: Judged) -> dict[str, float]:
    return {"accuracy": round(judged.accuracy, 4), "loss": round(judged.loss, 4)}


def _middle(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians over the seeds."""
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in ("accuracy", "loss")}


def table(result: Json) -> str:
    """For people."""
    lines = [f"{'seed':<8}{'bare':>16}" + "".join(f"{kind:>16}" for kind in FACTORS)]
    for name, run in [*((str(run["seed"]), run) for run in result["runs"]), ("median", result)]:
        cells = (run[kind] for kind in ("bare", *FACTORS))
        lines.append(f"{name:<8}" + "".join(f"{100 * c['accuracy']:8.1f} %{c['loss']:6.3f}" for c in cells))
    return "\n".join(lines)
