"""How much privacy the samples of this device have given away: a ledger that is written before each step.

One row per data set: what its differentially private steps have cost so far, as Renyi divergences at the
accountant's orders. What is reserved counts as spent, whatever becomes of the steps: a crash between the two costs
budget and never forgets any.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshnode.core.errors import Declined, DiskError
from meshnode.policy import accountant
from meshnode.state.sqlite_file import SqliteFile

SPENT: Final = "privacy-spent"  # code of the refusal
SAMPLES: Final = "samples"  # the data set that is the replay buffer of this node

MIGRATIONS: Final = (
    """
    CREATE TABLE ledger (
        dataset TEXT PRIMARY KEY, orders TEXT NOT NULL, costs TEXT NOT NULL, steps INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
)
_ORDERS: Final = json.dumps(accountant.ORDERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Equal steps on one data set. See `policy/accountant.py` for `rate` and `noise`."""

    rate: float
    noise: float
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """As far as a data set may go: (epsilon, delta)."""

    epsilon: float
    delta: float


def plan_for(limit: Limit, *, samples: int, batch: int, steps: int, lasting: int) -> Plan:
    """Steps that draw `batch` of so many samples in the mean, so noisy that `lasting` of them fit into the limit.

    Takes a second on a small device. Raises Declined `privacy-spent` when no noise is enough.
    """
    rate = min(1.0, batch / max(1, samples))
    try:
        noise = accountant.noise_for(limit.epsilon, limit.delta, rate, lasting)
    except ValueError as error:
        raise Declined(
            SPENT, f"private training of {samples} samples is not possible as it is set: {error}"
        ) from error
    return Plan(rate=rate, noise=noise, steps=steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """What was spent on a data set. `costs`: Renyi divergences at the accountant's orders."""

    steps: int = 0
    costs: tuple[float, ...] = (0.0,) * len(accountant.ORDERS)

    def epsilon(self, delta: float) -> float:
        """Raises ValueError: delta outside (0, 1)."""
        return accountant.epsilon(self.costs, delta)

    def with_steps(self, plan: Plan) -> Spending:
        """After those of the plan."""
        step = accountant.step_cost(plan.rate, plan.noise)
        return Spending(
            steps=self.steps + plan.steps,
            costs=tuple(cost + plan.steps * more for cost, more in zip(self.costs, step, strict=True)),
        )


class Budget(SqliteFile):
    """The open ledger. Every write is flushed to the disk before it returns. For one thread."""

    def __init__(self, path: Path | None) -> None:
        """`path`: None keeps it in memory. Raises DiskError, ConfigError (written by a newer version)."""
        super().__init__(
            path,
            MIGRATIONS,
            what="privacy ledger",
            lost="what was spent is forgotten with it",
        )
        with self._guard():
            self._db.execute("PRAGMA synchronous=FULL")  # a power cut gives nothing back

    def spent(self, dataset: str) -> Spending:
        """Raises DiskError."""
        with self._guard():
            row = self._db.execute("SELECT orders, costs, steps FROM ledger WHERE dataset = ?", (dataset,)).fetchone()
        return Spending() if row is None else self._read(*row)

    def steps_left(self, dataset: str, plan: Plan, limit: Limit) -> int:
        """How many steps like those of the plan still fit, at most as many as it has."""
        return _fitting(self.spent(dataset), plan, limit)

    def reserve(self, dataset: str, plan: Plan, limit: Limit) -> float:
        """Count the steps of the plan as spent, before they are made; epsilon after them.

        Raises Declined `privacy-spent`, and counts nothing, when that is more than the limit; DiskError.
        """
        with self._transaction():
            before = self.spent(dataset)
            after = before.with_steps(plan)
            total = after.epsilon(limit.delta)
            if total > limit.epsilon:
                raise Declined(SPENT, _refusal(before, plan, limit, total))
            self._db.execute(
                "INSERT OR REPLACE INTO ledger VALUES (?, ?, ?, ?)",
                (dataset, _ORDERS, json.dumps(after.costs), after.steps),
            )
        return total

    def _read(self, orders: str, costs: str, steps: int) -> Spending:
        try:
            if orders != _ORDERS:
                raise ValueError("it was written for other orders")
            found = tuple(float(cost) for cost in json.loads(costs))
            accountant.epsilon(found, 0.5)
            if not all(cost >= 0 for cost in found):
                raise ValueError("a cost is negative, or no number")
        except (ValueError, TypeError) as error:
            raise DiskError(
                f"the privacy ledger {self.path} is damaged: {error}. Nothing is trained with differential privacy "
                "until it is moved away; what was spent is forgotten with it"
            ) from error
        return Spending(steps=steps, costs=found)


def _fitting(before: Spending, plan: Plan, limit: Limit) -> int:
    step = accountant.step_cost(plan.rate, plan.noise)
    fits, over = 0, plan.steps + 1
    while over - fits > 1:
        middle = (fits + over) // 2
        costs = [cost + middle * more for cost, more in zip(before.costs, step, strict=True)]
        if accountant.epsilon(costs, limit.delta) <= limit.epsilon:
            fits = middle
        else:
            over = middle
    return fits


def _refusal(before: Spending, plan: Plan, limit: Limit, total: float) -> str:
    so_far = before.epsilon(limit.delta)
    fitting = _fitting(before, plan, limit)
    left = f"{fitting} of them would fit" if fitting else "not even one of them fits"
    return (
        f"the privacy budget of this device's samples allows epsilon {limit.epsilon:g} (delta {limit.delta:g}); "
        f"{before.steps} steps have taken {so_far:.3f}, and {plan.steps} more would make it {total:.3f}: {left}. "
        "They are not made. Raise learn.epsilon if you accept that more can be told about the samples"
    )
