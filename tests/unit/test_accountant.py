"""The accountant beside dp-accounting, whose answers lie in a file, and what it must do whatever the numbers are."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from meshnode.policy.accountant import ORDERS, epsilon, noise_for, spent, step_cost

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "dp_accounting.json").read_text())


@pytest.mark.parametrize("setting", REFERENCE["settings"], ids=lambda setting: "-".join(map(str, setting.values())))
def test_epsilon_is_that_of_dp_accounting(setting: dict[str, float]) -> None:
    ours = spent(setting["rate"], setting["noise"], int(setting["steps"]), setting["delta"])
    print(f"{ours:.6f} here, {setting['rdp']:.6f} there, {setting['pld']:.6f} by its tight accountant")
    assert ours == pytest.approx(setting["rdp"], rel=0.01)
    assert ours >= setting["pld"] * 0.999, "never less than what holds"


def test_ten_settings_are_compared() -> None:
    assert len(REFERENCE["settings"]) >= 10


@pytest.mark.parametrize("entry", REFERENCE["divergences"], ids=lambda entry: f"{entry['rate']}-{entry['noise']}")
def test_each_whole_order_is_that_of_dp_accounting(entry: dict[str, Any]) -> None:
    ours = dict(zip(ORDERS, step_cost(entry["rate"], entry["noise"]), strict=True))
    assert len(entry["costs"]) > 60
    for order, theirs in entry["costs"]:
        assert ours[order] == pytest.approx(theirs, rel=1e-6), order


@pytest.mark.parametrize("rate", [0.001, 0.02, 0.3, 0.9])
@pytest.mark.parametrize("noise", [0.7, 0.9, 3.0, 20.0])
def test_the_orders_between_are_the_integral_that_defines_them(rate: float, noise: float) -> None:
    ours = dict(zip(ORDERS, step_cost(rate, noise), strict=True))
    for order in (1.1, 1.5, 2.7, 10.9):

        def more(z: float, order: float = order) -> float:
            ratio = 1 - rate + rate * math.exp((2 * z - 1) / (2 * noise**2))
            return math.exp(-(z**2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi)) * (ratio**order - 1)

        area, _ = quad(
            more, -12 * noise, order + 12 * noise, limit=500, points=[0, order], epsabs=1e-15, epsrel=1e-10
        )
        assert ours[order] == pytest.approx(math.log1p(area) / (order - 1), rel=1e-6, abs=1e-12), order


def test_the_costs_grow_with_the_order() -> None:
    for rate, noise in ((0.001, 20.0), (0.016, 0.59), (0.25, 2.0), (0.9, 0.3)):
        costs = step_cost(rate, noise)
        assert all(math.isfinite(cost) for cost in costs)
        assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(costs)), (rate, noise)


rates = st.floats(1e-4, 0.5)
noises = st.floats(0.5, 20)


@settings(max_examples=20)
@given(rates, noises, st.integers(1, 5000), st.sampled_from([1e-7, 1e-5, 1e-3]))
def test_more_steps_less_noise_and_a_smaller_delta_cost_more(
    rate: float, noise: float, steps: int, delta: float
) -> None:
    base = spent(rate, noise, steps, delta)
    assert base >= 0
    slack = 1e-9 * (1 + base)
    assert spent(rate, noise, steps + 1, delta) >= base - slack
    assert spent(rate, noise * 1.1, steps, delta) <= base + slack
    assert spent(rate, noise, steps, delta / 10) >= base - slack
    assert spent(min(1.0, rate * 1.1), noise, steps, delta) >= base - slack


def test_the_ends() -> None:
    assert spent(0, 1, 1000, 1e-5) == 0
    assert step_cost(1.0, 2.0)[0] == pytest.approx(ORDERS[0] / 8), "the plain Gaussian mechanism"
    assert spent(0.01, 1.0, 0, 1e-5) == 0
    assert epsilon([math.inf] * len(ORDERS), 1e-5) == math.inf


def test_the_noise_that_a_budget_needs() -> None:
    for limit, rate, steps in ((1.0, 0.016, 188), (8.0, 0.016, 188), (0.5, 0.001, 10_000)):
        noise = noise_for(limit, 1e-5, rate, steps)
        assert spent(rate, noise, steps, 1e-5) <= limit < spent(rate, noise * 0.99, steps, 1e-5)
    with pytest.raises(ValueError, match=r"no noise makes 10000000 steps .* take fewer steps"):
        noise_for(1e-4, 1e-9, 0.5, 10_000_000)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: step_cost(-0.1, 1), "sampling rate"),
        (lambda: step_cost(math.nan, 1), "sampling rate"),
        (lambda: step_cost(0.1, 0), "noise multiplier"),
        (lambda: step_cost(0.1, math.inf), "noise multiplier"),
        (lambda: epsilon([0.0], 1e-5), "1 divergences were given for"),
        (lambda: spent(0.1, 1, 1, 0), "delta is between 0 and 1"),
    ],
)
def test_what_is_no_setting(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
