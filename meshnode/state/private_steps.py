"""Differentially private steps within what the owner allows: how noisy they are, and the ledger that counts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from meshnode.state.budget import SAMPLES, Budget, Limit, Plan, plan_for

CLIP: Final = 1.0  # largest norm of one sample's gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How steps are to be made, and what all of them have cost with these."""

    clip: float
    sigma: float  # of the noise, as a multiple of `clip`
    epsilon: float
    delta: float


class PrivateSteps:
    """The samples of this device, on the owner's terms. For one thread, but for `plan`."""

    def __init__(self, budget: Budget, limit: Limit, lasting: int) -> None:
        """`lasting`: steps that the limit is to be enough for."""
        self._budget = budget
        self._limit = limit
        self._lasting = lasting

    def plan(self, samples: int, batch: int, steps: int) -> Plan:
        """Takes a second. Raises Declined `privacy-spent` when no noise is enough."""
        return plan_for(self._limit, samples=samples, batch=batch, steps=steps, lasting=self._lasting)

    def reserve(self, plan: Plan) -> Terms:
        """Count the steps as spent, before they are made. Raises Declined `privacy-spent`, DiskError."""
        epsilon = self._budget.reserve(SAMPLES, plan, self._limit)
        return Terms(clip=CLIP, sigma=plan.noise, epsilon=epsilon, delta=self._limit.delta)
