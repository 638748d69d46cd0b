"""How long a round of averaging takes among real nodes: notices, deltas by CID through content, checks, the mix.

Four node processes on loopback with a trainer that adds nearly the same numbers everywhere, in no time. A round lasts
from the end of one training to the end of the next one, so all of it counts: records, signatures, files with fsync.

    python -m meshnode.bench.exchange --data FOLDER

runs one of these nodes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio

from meshnode.bench.machine import machine
from meshnode.harness.hostile import run_changed
from meshnode.harness.learn import Experiment, make, teach
from meshnode.harness.member import HarnessError, Member
from meshnode.harness.tasks import logs
from meshnode.trainer.port import (
    EvaluateJob,
    Evaluation,
    LocalJob,
    Report,
    Step,
    Trained,
    TrainedLocally,
    TrainJob,
)

Json = dict[str, Any]
NODES: Final = 4
# both are exact
MODES: Final[dict[str, dict[str, object]]] = {
    "pairs": {"mode": "pairwise", "mixes": 0},
    "group": {"mode": "group", "mixes": 1},
}
_STEP: Final = 1e-3  # what all learn in a round, in each value
_NOISE: Final = 2e-4  # what each node learns for itself
_TRAINED: Final = "learning.trained"


class StillTrainer:
    """Changes every value a little, in no time (`Trainer` of trainer/port.py)."""

    def __init__(self) -> None:
        self._chance = np.random.default_rng()
        self._paused = False

    async def train(self, job: TrainJob, report: Report = lambda _step: None) -> Trained:
        """See port.py."""
        await trio.lowlevel.checkpoint()
        job.folder.mkdir(parents=True, exist_ok=True)
        optimiser = job.folder / "nothing"
        optimiser.touch()
        learned = self._chance.normal(_STEP, _NOISE, len(job.start)).astype(np.float32)
        for number in range(job.steps):
            report(Step(number + 1, 0.0, 0.0))
        return Trained(
            vector=job.start + learned,
            optimiser=optimiser,
            losses=(0.0,) * job.steps,
            seconds=0.0,
            skipped=0,
            resumed=0,
        )

    async def train_locally(self, job: LocalJob, report: Report = lambda _step: None) -> TrainedLocally:
        """Nobody asks for it here."""
        raise NotImplementedError

    async def evaluate(self, job: EvaluateJob) -> tuple[Evaluation, ...]:
        """Every adapter is as good as the others."""
        await trio.lowlevel.checkpoint()
        count, labels = len(job.samples), job.labels or ("",)
        same = Evaluation(
            labels=labels,
            losses=np.zeros(count, np.float32),
            scores=np.zeros((count, len(labels)), np.float32),
            right=np.ones(count, bool),
        )
        return (same,) * len(job.adapters)

    def pause(self) -> None:
        """See port.py."""
        self._paused = True

    def resume(self) -> None:
        """See port.py."""
        self._paused = False

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def rss_bytes(self) -> int:
        return 0

    async def aclose(self) -> None:
        """See port.py."""
        await trio.lowlevel.checkpoint()


def measure(published: Path, folder: Path, mode: str, *, rounds: int, say: Callable[[str], None]) -> Json:
    """Seconds and bytes of a round, all layers' q and v at rank 8. Blocking.

    Args:
      published: a folder that the publisher wrote, with the variant `train`.
      folder: for the data folders of the nodes.
      mode: one of MODES.

    Raises HarnessError.
    """
    trains, heldout = logs(sites=NODES, per_site=16, heldout=16).write(folder / "files")
    experiment = Experiment(
        trains=trains,
        heldout=heldout,
        published=published,
        options={"rounds": rounds, "steps": 1, "gate": 0, "layers": "all", "targets": "q,v", **MODES[mode]},
    )
    mesh = make(experiment, folder / "mesh")
    for member in mesh.serving:
        member.program = ("meshnode.bench.exchange",)
    try:
        mesh.up()
        learned = teach(mesh, experiment, say)
    finally:
        mesh.down()
    took = [seconds for member in mesh.serving for seconds in _between(member)]
    return {
        "mode": mode,
        "parameters": learned.frame.parameters,
        "rounds": rounds,
        "round_s": round(statistics.median(took), 4),
        "quickest_s": round(min(took), 4),
        "slowest_s": round(max(took), 4),
        "mean_s": round(statistics.mean(took), 4),
        "bytes_a_round_and_node": round(
            statistics.mean(status.fetched_bytes / rounds for status in learned.statuses)
        ),
        "mixed": [status.mixed for status in learned.statuses],
        "refused": [dict(status.refused) for status in learned.statuses],
        "spread": float(max(np.abs(vector - learned.vectors[0]).max() for vector in learned.vectors)),
        "machine": machine(),
    }


def _between(member: Member) -> list[float]:
    """Seconds between one training of a node and the next one, from its log. Raises HarnessError."""
    ends = []
    for line in member.log.read_text(encoding="utf-8").splitlines():
        if _TRAINED in line:
            ends.append(datetime.fromisoformat(json.loads(line)["timestamp"]).timestamp())
    if len(ends) < 2:
        raise HarnessError(f"{member.name} has not trained twice: {member.last_words()}")
    return [after - before for before, after in pairwise(ends)]


def main() -> int:
    """Run a node that learns nothing; see the top of this file."""
    parser = argparse.ArgumentParser(prog="meshnode.bench.exchange")
    parser.add_argument("--data", type=Path, required=True)
    run_changed(parser.parse_args().data, lambda parts: replace(parts, trainer=StillTrainer()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
