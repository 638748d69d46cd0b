"""Methods of one node's own: they learn, are gone on with, are judged, and leave the model as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshnode.core.errors import BadRequest
from meshnode.trainer.port import METHODS, EvaluateJob, LocalJob, ModelFiles, Schedule, Step
from meshnode.trainer.wire import evaluations_from_files
from meshnode.trainer.workshop import Workshop
from tests.trainer.tiny import frame_of, job_of, samples, tiny_model

RATES = {"adalora": 0.05, "prefix": 0.1, "prompt": 0.1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def job(folder: Path, model: ModelFiles, method: str, **changes: Any) -> LocalJob:
    given = LocalJob(
        folder=folder,
        model=model,
        method=method,
        samples=samples(24),
        steps=40,
        schedule=Schedule(rate=RATES.get(method, 0.1), total=40),
        rank=4,
        compute="float32",
    )
    return replace(given, **changes)


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_leaves_the_model_as_it_was(method: str, model: ModelFiles, tmp_path: Path) -> None:
    judged = EvaluateJob(
        model=model, frame=frame_of(), adapters=(None,), samples=samples(30, seed=99), compute="float32"
    )
    workshop = Workshop()
    workshop.carry_out(job_of(tmp_path / "before", model, steps=1), tmp_path, lambda step: None)  # has factors on
    done = workshop.carry_out(job(tmp_path / "job", model, method), tmp_path, lambda step: None)
    adapter = Path(done["adapter"])
    said = workshop.carry_out(replace(judged, adapters=(None, adapter, None)), tmp_path, lambda step: None)
    before, after, again = evaluations_from_files(said, tmp_path, replace(judged, adapters=(None,) * 3))
    print(method, before.loss, after.loss, after.accuracy, done["losses"][:2], done["losses"][-2:])
    assert after.loss < 0.8 * before.loss and np.mean(done["losses"][-5:]) < 0.8 * np.mean(done["losses"][:5])
    assert np.allclose(again.losses, before.losses, atol=1e-4)
    said = Workshop().carry_out(replace(judged, adapters=(adapter,)), tmp_path, lambda step: None)
    (elsewhere,) = evaluations_from_files(said, tmp_path, judged)  # read from its files alone
    assert np.allclose(elsewhere.losses, after.losses, atol=1e-4)


# while AdaLoRA takes ranks away, and after that; the two others keep the same
@pytest.mark.parametrize(("method", "killed_at"), [("adalora", 8), ("adalora", 33), ("prompt", 3)])
def test_it_is_gone_on_with(method: str, killed_at: int, model: ModelFiles, tmp_path: Path) -> None:
    whole = Workshop().carry_out(job(tmp_path / "whole", model, method), tmp_path, lambda step: None)

    def die(step: Step) -> None:
        if step.number == killed_at:
            raise Killed

    with pytest.raises(Killed):
        Workshop().carry_out(job(tmp_path / "killed", model, method), tmp_path, die)
    steps: list[int] = []
    rest = Workshop().carry_out(
        job(tmp_path / "killed", model, method), tmp_path, lambda step: steps.append(step.number)
    )
    assert rest["resumed"] == killed_at and steps == list(range(killed_at + 1, 41))
    assert rest["losses"] == pytest.approx(whole["losses"], abs=1e-3)


def test_unknown_methods_and_adapters_are_refused(model: ModelFiles, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="there are adalora, prefix and prompt"):
        Workshop().carry_out(job(tmp_path / "job", model, "magic"), tmp_path, lambda step: None)
    judged = EvaluateJob(model=model, frame=frame_of(), adapters=(tmp_path,), samples=samples(3), compute="float32")
    with pytest.raises(BadRequest, match="holds no adapter for this model"):
        Workshop().carry_out(judged, tmp_path, lambda step: None)
