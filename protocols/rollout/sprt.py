"""Whether an adapter fails more often than what was served before: a sequential test of two error rates.

Wald's test of H0 (the usual rate p) against H1 (twice that). It stops as early as the answers allow.
A. Wald, Sequential Tests of Statistical Hypotheses, Annals of Mathematical Statistics 16 (1945).
"""

from __future__ import annotations

from collections.abc import Collection
from math import log
from typing import Final

ALPHA: Final = 0.01  # a good adapter is stopped
BETA: Final = 0.05  # a bad one is not
STOP_AT: Final = log((1 - BETA) / ALPHA)  # 4.55
LEAST, HIGHEST = 0.01, 0.4  # usual rates: below, two errors would be a catastrophe; above, twice as many mean nothing
_PRIOR: Final = (5, 100)  # wrong answers and answers, as if seen before: a new node expects 5 %


def usual_rate(right: int, wrong: int) -> float:
    """The rate of wrong answers to be expected, from those of what was served before."""
    return min(max((wrong + _PRIOR[0]) / (right + wrong + _PRIOR[1]), LEAST), HIGHEST)


def likelihood(right: int, wrong: int, usual: float) -> float:
    """Logarithm of how much more likely these answers are at twice the usual rate than at the usual one."""
    return wrong * log(2.0) + right * log((1 - 2 * usual) / (1 - usual))


def is_stopped(right: int, wrong: int, usual: float) -> bool:
    """Whether the answers show that the rate has doubled."""
    return likelihood(right, wrong, usual) > STOP_AT


def are_stopped(likelihoods: Collection[float]) -> bool:
    """The same for what several nodes have seen; those that lie, if fewer than half, can't decide it.

    The sum over all nodes would be the test of all their answers; the median stands for each of them instead.
    """
    ordered = sorted(likelihoods)
    return bool(ordered) and len(ordered) * ordered[(len(ordered) - 1) // 2] > STOP_AT
