"""The privacy ledger: it is written before the steps, survives everything, and refuses in a sentence."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.core.errors import Declined, DiskError
from meshnode.policy import accountant
from meshnode.state.budget import SAMPLES, SPENT, Budget, Limit, Plan, plan_for

LIMIT = Limit(epsilon=2.0, delta=1e-5)
PLAN = Plan(rate=0.016, noise=0.96, steps=10)


def test_steps_add_up_and_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "privacy.sqlite"
    with Budget(path) as budget:
        first = budget.reserve(SAMPLES, PLAN, LIMIT)
        assert first == pytest.approx(accountant.spent(PLAN.rate, PLAN.noise, 10, LIMIT.delta))
        assert budget.reserve("another", PLAN, LIMIT) == first, "each data set has its own"
    with Budget(path) as budget:
        other = Plan(rate=0.032, noise=1.2, steps=5)
        budget.reserve(SAMPLES, other, LIMIT)
        step = accountant.step_cost
        costs = [10 * a + 5 * b for a, b in zip(step(0.016, 0.96), step(0.032, 1.2), strict=True)]
        assert budget.spent(SAMPLES).epsilon(1e-5) == pytest.approx(accountant.epsilon(costs, 1e-5))
        assert budget.spent(SAMPLES).steps == 15
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_step_that_would_pass_the_budget_is_refused_also_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "privacy.sqlite"
    steps = 0
    for _ in range(100):
        with Budget(path) as budget:  # a new process each time
            fitting = budget.steps_left(SAMPLES, PLAN, LIMIT)
            if fitting < PLAN.steps:
                break
            assert budget.reserve(SAMPLES, PLAN, LIMIT) <= LIMIT.epsilon
            steps += PLAN.steps
    assert 150 < steps < 250, "as many as the notes of the accountant say"
    with Budget(path) as budget:
        with pytest.raises(Declined) as caught:
            budget.reserve(SAMPLES, PLAN, LIMIT)
        assert caught.value.code == SPENT
        told = str(caught.value)
        assert told.startswith("the privacy budget of this device's samples allows epsilon 2 (delta 1e-05); ")
        assert f"{steps} steps have taken 1." in told and "10 more would make it 2." in told
        assert f"{fitting} of them would fit" in told if fitting else "not even one of them fits" in told
        assert budget.spent(SAMPLES).steps == steps, "nothing was counted"
        if fitting:
            budget.reserve(SAMPLES, Plan(rate=0.016, noise=0.96, steps=fitting), LIMIT)
        with pytest.raises(Declined, match="not even one of them fits"):
            budget.reserve(SAMPLES, Plan(rate=0.016, noise=0.96, steps=1), LIMIT)
        assert budget.reserve(SAMPLES, PLAN, Limit(epsilon=4, delta=1e-5)) < 4, "its owner may allow more"


def test_a_plan_lasts_as_long_as_it_is_to() -> None:
    plan = plan_for(LIMIT, samples=400, batch=8, steps=10, lasting=300)
    assert (plan.rate, plan.steps) == (0.02, 10)
    with Budget(None) as budget:
        assert budget.steps_left(SAMPLES, Plan(rate=plan.rate, noise=plan.noise, steps=1000), LIMIT) in range(
            300, 306
        )
    assert plan_for(LIMIT, samples=0, batch=8, steps=1, lasting=10).rate == 1
    with pytest.raises(Declined, match="private training of 8 samples is not possible as it is set: no noise"):
        plan_for(Limit(epsilon=0.001, delta=1e-5), samples=8, batch=8, steps=1, lasting=10_000_000)


RESERVES = """
import os, signal, sys
from pathlib import Path
from meshnode.state.budget import Budget, Limit, Plan, SAMPLES
with Budget(Path(sys.argv[1])) as budget:
    while True:
        budget.reserve(SAMPLES, Plan(rate=0.016, noise=0.96, steps=1), Limit(epsilon=2.0, delta=1e-5))
        print("step", flush=True)
"""


def test_kill_9_never_gives_a_step_back(tmp_path: Path) -> None:
    path = tmp_path / "privacy.sqlite"
    child = subprocess.Popen([sys.executable, "-c", RESERVES, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    made = sum(child.stdout.readline() == "step\n" for _ in range(5))
    child.kill()
    made += child.communicate()[0].count("step\n")
    assert child.returncode == -signal.SIGKILL
    with Budget(path) as budget:
        assert made <= budget.spent(SAMPLES).steps <= made + 1


@pytest.mark.parametrize(
    "values",
    [("[2.0]", "[1.0]"), (None, "[1.0]"), (None, "no JSON"), (None, "[null]"), (None, "negative"), (None, "nan")],
)
def test_a_damaged_ledger_is_no_empty_one(values: tuple[str | None, str], tmp_path: Path) -> None:
    orders, costs = values
    with Budget(tmp_path / "privacy.sqlite") as budget:
        budget.reserve(SAMPLES, PLAN, LIMIT)
        if costs in ("negative", "nan"):
            one = "-1.0" if costs == "negative" else "NaN"
            costs = "[" + ", ".join([one] * len(accountant.ORDERS)) + "]"
        budget._db.execute("UPDATE ledger SET costs = ?, orders = coalesce(?, orders)", (costs, orders))
        with pytest.raises(DiskError, match=r"the privacy ledger .*privacy\.sqlite is damaged"):
            budget.reserve(SAMPLES, PLAN, LIMIT)
        with pytest.raises(DiskError, match="is damaged"):
            budget.steps_left(SAMPLES, PLAN, LIMIT)
