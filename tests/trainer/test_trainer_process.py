"""The trainer's process: what it ends with, what it survives, and what it says when it can't."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import trio
import trio.testing

from meshnode.core.errors import BadRequest, ModelError, TrainerLost
from meshnode.trainer.port import EvaluateJob, ModelFiles, Privacy, Sample, Schedule, Step
from meshnode.trainer.process import TrainerProcess
from tests.trainer.tiny import WIDTHS, frame_of, job_of, samples, tiny_model

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trainer() -> Iterator[TrainerProcess]:
    """One for all tests: starting it takes seconds of computing."""
    made = TrainerProcess()
    yield made
    trio.run(made.aclose)


def child_of(trainer: TrainerProcess) -> psutil.Process:
    (child,) = [process for process in psutil.Process().children() if "meshnode.trainer" in process.cmdline()]
    return child


async def test_it_learns_and_says_how_well(trainer: TrainerProcess, model: ModelFiles, tmp_path: Path) -> None:
    seen: list[Step] = []
    frame = frame_of(*WIDTHS, first=1)
    schedule = Schedule(rate=0.007, total=150)
    more = {"frame": frame, "steps": 150, "schedule": schedule, "samples": samples(120), "cache": tmp_path / "cache"}
    done = await trainer.train(job_of(tmp_path / "job", model, **more), seen.append)
    assert [step.number for step in seen] == list(range(1, 151))
    assert [step.loss for step in seen] == pytest.approx(done.losses)
    assert np.mean(done.losses[-5:]) < 0.5 * np.mean(done.losses[:5])
    assert (done.resumed, done.skipped) == (0, 0) and done.seconds > 0
    assert done.vector.shape == (frame.parameters,) and done.vector.dtype == np.float32

    heldout = samples(30, seed=99)
    judge = EvaluateJob(model=model, frame=frame, adapters=(None, done.vector), samples=heldout, compute="float32")
    before, after = await trainer.evaluate(judge)
    assert after.accuracy >= 0.85 > before.accuracy and after.loss < before.loss
    assert np.array_equal(
        before.right, (await trainer.evaluate(replace(judge, adapters=(frame.initial(),))))[0].right
    )


async def test_what_was_done_is_not_done_again(trainer: TrainerProcess, model: ModelFiles, tmp_path: Path) -> None:
    job = job_of(tmp_path, model, steps=3)
    first = await trainer.train(job)
    seen: list[Step] = []
    again = await trainer.train(job, seen.append)
    assert (again.resumed, seen) == (3, []) and np.array_equal(again.vector, first.vector)
    other = await trainer.train(replace(job, seed=5))
    assert other.resumed == 0 and not np.array_equal(other.vector, first.vector)


async def test_two_jobs_in_a_row_are_one_of_their_length(
    trainer: TrainerProcess, model: ModelFiles, tmp_path: Path
) -> None:
    whole = await trainer.train(job_of(tmp_path / "whole", model, steps=6))
    first = job_of(tmp_path / "first", model, steps=2, schedule=Schedule(rate=0.02, total=6))
    half = await trainer.train(first)
    rest = replace(
        first,
        folder=tmp_path / "rest",
        start=half.vector,
        optimiser=half.optimiser,
        steps=4,
        schedule=replace(first.schedule, done=2),
    )
    assert np.allclose((await trainer.train(rest)).vector, whole.vector, atol=1e-5)


async def test_only_the_factors_that_move_do(trainer: TrainerProcess, model: ModelFiles, tmp_path: Path) -> None:
    for factor in "AB":
        job = job_of(tmp_path / factor, model, steps=2, factors=(factor,))
        start = np.random.default_rng(1).normal(0, 0.2, job.frame.parameters).astype(np.float32)
        done = await trainer.train(replace(job, start=start))
        before, after = job.frame.split(start), job.frame.split(done.vector)
        for name in before:
            assert np.array_equal(before[name], after[name]) != name.endswith(factor), name


async def test_killed_it_goes_on_where_it_was(trainer: TrainerProcess, model: ModelFiles, tmp_path: Path) -> None:
    expected = await trainer.train(job_of(tmp_path / "undisturbed", model, steps=6))
    job = job_of(tmp_path / "killed", model, steps=6)
    before: list[Step] = []

    def kill(step: Step) -> None:
        before.append(step)
        if step.number == 3:
            os.kill(child_of(trainer).pid, signal.SIGKILL)

    with pytest.raises(TrainerLost, match="SIGKILL"):
        await trainer.train(job, kill)
    after: list[Step] = []
    done = await trainer.train(job, after.append)
    assert done.resumed >= before[-1].number - 1  # the step that it was at may be lost
    assert [step.number for step in after] == list(range(done.resumed + 1, 7))
    assert np.allclose(done.vector, expected.vector, atol=1e-5)
    assert done.losses == pytest.approx(expected.losses, abs=1e-4)


async def test_a_state_that_is_cut_off_is_begun_anew(
    trainer: TrainerProcess, model: ModelFiles, tmp_path: Path
) -> None:
    job = job_of(tmp_path, model, steps=2)
    first = await trainer.train(job)
    first.optimiser.write_bytes(first.optimiser.read_bytes()[:-5])
    again = await trainer.train(job)
    assert again.resumed == 0 and np.allclose(again.vector, first.vector, atol=1e-6)


async def test_cancelled_it_ends_at_once_and_goes_on_later(
    trainer: TrainerProcess, model: ModelFiles, tmp_path: Path
) -> None:
    job = job_of(tmp_path, model, steps=100_000)
    pids: list[int] = []
    with trio.CancelScope() as scope:

        def stop(step: Step) -> None:
            if step.number == 2:
                pids.append(child_of(trainer).pid)
                scope.cancel()

        await trainer.train(job, stop)
    assert scope.cancelled_caught and not psutil.pid_exists(pids[0]) and trainer.rss_bytes == 0
    trainer.pause()  # before there is a process
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trainer.train, replace(job, steps=2))
        while not trainer.rss_bytes:
            await trio.testing.wait_all_tasks_blocked()
        child = child_of(trainer)
        while child.status() != psutil.STATUS_STOPPED:
            await trio.lowlevel.checkpoint()
        trainer.resume()
    assert child.nice() == 19
    if sys.platform == "linux":
        assert child.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE


async def test_paused_it_computes_nothing(trainer: TrainerProcess, model: ModelFiles, tmp_path: Path) -> None:
    reached = trio.Event()
    steps: list[int] = []

    def report(step: Step) -> None:
        steps.append(step.number)
        if step.number == 3:
            trainer.pause()
            reached.set()

    job = job_of(tmp_path, model, steps=60)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trainer.train, job, report)
        await reached.wait()
        child = child_of(trainer)
        while child.status() != psutil.STATUS_STOPPED:
            await trio.lowlevel.checkpoint()
        assert trainer.paused
        try:
            while True:  # what it had written before is read; then nothing comes
                before = len(steps)
                await trio.testing.wait_all_tasks_blocked(0.2)
                if len(steps) == before:
                    break
            cpu, count = child.cpu_times(), len(steps)
            await trio.testing.wait_all_tasks_blocked(0.3)
            later = child.cpu_times()
            assert later.user + later.system - cpu.user - cpu.system < 0.05 and len(steps) == count < 60
        finally:
            trainer.resume()
    assert steps == list(range(1, 61)) and not trainer.paused


async def test_private_steps(trainer: TrainerProcess, model: ModelFiles, tmp_path: Path) -> None:
    quiet = job_of(tmp_path / "quiet", model, steps=60, batch=12, privacy=Privacy(clip=10.0, sigma=0.0))
    done = await trainer.train(quiet)
    assert np.nanmean(done.losses[-5:]) < 0.5 * np.nanmean(done.losses[:5])
    loud = job_of(tmp_path / "loud", model, steps=3, privacy=Privacy(clip=0.1, sigma=5.0))
    noisy = [await trainer.train(replace(loud, folder=tmp_path / str(k))) for k in range(2)]
    assert not np.allclose(noisy[0].vector, noisy[1].vector, atol=1e-3)  # nobody can repeat the noise
    with pytest.raises(BadRequest, match="needs as many samples"):
        await trainer.train(replace(loud, batch=25))


Change = Callable[[Any], Any]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda job: replace(job, samples=()), BadRequest, "needs samples"),
        (lambda job: replace(job, samples=(Sample("", ""),)), BadRequest, "no label"),
        (lambda job: replace(job, max_tokens=3), BadRequest, "at most 3 tokens"),
        (lambda job: replace(job, factors=("C",)), BadRequest, "moves A, B or both"),
        (lambda job: replace(job, optimiser=Path("/nowhere")), BadRequest, "holds no moments"),
        (lambda job: replace(job, frame=frame_of(first=3)), BadRequest, "of this frame is"),
        (
            lambda job: replace(job, model=replace(job.model, name="y", config=Path("/no"))),
            ModelError,
            "configuration",
        ),
    ],
    ids=["no-samples", "empty", "long", "factors", "moments", "vector", "config"],
)
async def test_what_can_not_be_done_is_said(
    trainer: TrainerProcess, model: ModelFiles, tmp_path: Path, change: Change, kind: type[Exception], words: str
) -> None:
    job = job_of(tmp_path, model, steps=1)
    with pytest.raises(kind, match=words):
        await trainer.train(change(job))
    assert len((await trainer.train(job)).losses) == 1  # it is there for the next one


async def test_what_leads_to_no_numbers_is_said(trainer: TrainerProcess, model: ModelFiles, tmp_path: Path) -> None:
    job = job_of(tmp_path, model, steps=5)
    with pytest.raises(BadRequest, match=r"Step 1 led to values that are no numbers .* lower rate"):
        await trainer.train(replace(job, start=np.full(job.frame.parameters, 1e38, np.float32)))


@pytest.mark.parametrize(
    "line",
    [b"no json\n", b"[]\n", b"{}\n", b'{"step": 1}\n', b'{"done": 3}\n', b'{"done": {}}\n', b'{"error": []}\n'],
)
async def test_nonsense_from_the_process_is_no_answer(
    model: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes
) -> None:
    """What runs there has read what others made."""
    real = subprocess.Popen

    def other(command: list[str], **options: Any) -> Any:
        return real(
            [sys.executable, "-c", f"import sys; sys.stdin.readline(); sys.stdout.buffer.write({line!r})"], **options
        )

    monkeypatch.setattr(subprocess, "Popen", other)
    trainer = TrainerProcess()
    with pytest.raises(TrainerLost, match=r"The trainer is gone|makes no sense"):
        await trainer.train(job_of(tmp_path, model, steps=1))
    await trainer.aclose()


async def test_killed_between_jobs_it_is_there_again_and_closed_it_is_gone(
    trainer: TrainerProcess, model: ModelFiles, tmp_path: Path
) -> None:
    await trainer.train(job_of(tmp_path, model, steps=1))
    child = child_of(trainer)
    assert trainer.rss_bytes > 50e6
    os.kill(child.pid, signal.SIGKILL)  # while it has nothing to do
    child.wait()
    assert len((await trainer.train(job_of(tmp_path, model, steps=2))).losses) == 2
    child = child_of(trainer)
    await trainer.aclose()
    assert trainer.rss_bytes == 0 and not child.is_running()
