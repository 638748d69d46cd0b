"""The trainer without a model: it behaves as nodes with a language model do, in milliseconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing

from meshnode.core.errors import BadRequest
from meshnode.harness.tasks import logs
from meshnode.sim.trainer import SimTrainer
from meshnode.trainer.port import EvaluateJob, ModelFiles, Privacy, Sample, Schedule, Step, TrainJob
from protocols.delta.frame import Frame, Target, Vector
from protocols.ids import DAG_CBOR, cid_of

FRAME = Frame(
    base=cid_of(DAG_CBOR, b"base"),
    rank=8,
    alpha=16,
    targets=(Target("q_proj", 64, 64), Target("v_proj", 64, 16)),
    first=0,
    last=4,
    seed=1,
)
NOTHING = Path("/nonexistent")
MODEL = ModelFiles(name="none", config=NOTHING, tokenizer=NOTHING, index=NOTHING, groups={})
TASK = logs(sites=2, per_site=200, heldout=100)
NODES = [tuple(Sample(TASK.prompt.format(text), label) for text, label in node) for node in TASK.nodes]
HELDOUT = tuple(Sample(TASK.prompt.format(text), label) for text, label in TASK.heldout)


def job_of(folder: Path, node: int = 0, steps: int = 60) -> TrainJob:
    schedule = Schedule(rate=0.03, total=steps)
    start = FRAME.initial()
    return TrainJob(
        folder=folder, model=MODEL, frame=FRAME, start=start, samples=NODES[node], steps=steps, schedule=schedule
    )


def judging(*vectors: object) -> EvaluateJob:
    return EvaluateJob(model=MODEL, frame=FRAME, adapters=vectors, samples=HELDOUT, labels=TASK.labels)  # type: ignore[arg-type]


async def learned(folder: Path, *, averaged: bool) -> list[Vector]:
    """What both nodes have after six rounds of ten steps."""
    trainer, vectors, moments = SimTrainer(), [FRAME.initial()] * 2, [None] * 2
    for number in range(6):
        for k in range(2):
            job = replace(
                job_of(folder / f"{averaged}-{k}-{number % 2}", k, steps=10),
                start=vectors[k],
                optimiser=moments[k],
                schedule=Schedule(rate=0.02, total=60, done=10 * number),
            )
            done = await trainer.train(job)
            vectors[k], moments[k] = done.vector, done.optimiser  # type: ignore[call-overload]
        if averaged:
            vectors = [np.mean(vectors, axis=0).astype(np.float32)] * 2
    return vectors


async def test_two_that_average_know_more_than_each_alone(tmp_path: Path) -> None:
    alone, together = await learned(tmp_path, averaged=False), await learned(tmp_path, averaged=True)
    bare, one, other, both = await SimTrainer().evaluate(judging(None, *alone, together[0]))
    assert bare.loss == pytest.approx(np.log(len(TASK.labels) + 16))  # all labels are alike
    assert bare.accuracy < 0.25
    assert both.accuracy > max(one.accuracy, other.accuracy) + 0.15
    assert both.loss < 0.5 * min(one.loss, other.loss)


async def test_steps_go_on_where_others_ended(tmp_path: Path) -> None:
    trainer = SimTrainer()
    steps: list[Step] = []
    whole = await trainer.train(job_of(tmp_path / "whole", steps=6), steps.append)
    assert [step.number for step in steps] == list(range(1, 7))
    job = replace(job_of(tmp_path / "half", steps=6), steps=3)
    half = await trainer.train(job)
    rest = replace(
        job,
        folder=tmp_path / "rest",
        start=half.vector,
        optimiser=half.optimiser,
        schedule=replace(job.schedule, done=3),
    )
    assert np.allclose((await trainer.train(rest)).vector, whole.vector, atol=1e-6)
    assert (half.losses, half.skipped) == (whole.losses[:3], 0)


async def test_only_the_factors_that_move_do(tmp_path: Path) -> None:
    done = await SimTrainer().train(replace(job_of(tmp_path), factors=("B",)))
    before, after = FRAME.split(FRAME.initial()), FRAME.split(done.vector)
    for name in before:
        assert np.array_equal(before[name], after[name]) == name.endswith(".A")


async def test_noise_and_clipping(tmp_path: Path) -> None:
    trainer, job = SimTrainer(), job_of(tmp_path, steps=1)
    plain = (await trainer.train(job)).vector
    noisy = (await trainer.train(replace(job, privacy=Privacy(clip=0.1, sigma=1.0)))).vector
    assert not np.allclose(plain, noisy, atol=1e-3)
    assert np.array_equal(noisy, (await trainer.train(replace(job, privacy=Privacy(clip=0.1, sigma=1.0)))).vector)


async def test_paused_it_waits(tmp_path: Path) -> None:
    trainer = SimTrainer()
    trainer.pause()
    steps: list[Step] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trainer.train, job_of(tmp_path, steps=2), steps.append)
        await trio.testing.wait_all_tasks_blocked()
        assert trainer.paused and not steps
        trainer.resume()
    assert len(steps) == 2 and not trainer.paused


async def test_what_it_can_not_do_is_said(tmp_path: Path) -> None:
    trainer = SimTrainer()
    for job in (replace(job_of(tmp_path), samples=()), replace(job_of(tmp_path), start=np.zeros(3, np.float32))):
        with pytest.raises(BadRequest, match="a vector of the frame"):
            await trainer.train(job)
    with pytest.raises(BadRequest, match="each with one of the labels"):
        await trainer.evaluate(replace(judging(None), labels=("bearing",)))
    with pytest.raises(BadRequest, match="no adapter"):
        await trainer.evaluate(judging(tmp_path))
