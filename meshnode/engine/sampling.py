"""Picks a token from logits: the same (seed, position, logits, history) gives the same token on every node.

Order and meaning follow transformers' logits processors: repetition penalty, temperature, top-k, top-p.
Random numbers are counter-based (Philox 4x64-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011), keyed by the seed and counted by the position, so a replayed step draws the same number. Everything that
decides is made of additions, multiplications and comparisons of float64, which IEEE 754 rounds the same
everywhere; numpy's own `exp` differs in the last bit between processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from protocols.pipe.messages import Sampling

Floats = np.ndarray[Any, np.dtype[np.float64]]

_MASK: Final = (1 << 64) - 1
_MULTIPLIERS: Final = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL: Final = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_REACH: Final = 32.0  # nats below the best: a token there has 1e-14 of its chance and is left out

_LOG2E: Final = 1.4426950408889634
_LN2_HIGH: Final = 0.693147180369123816490  # fdlibm's split of ln 2: n * high is exact for |n| < 2**20
_LN2_LOW: Final = 1.90821492927058770002e-10
# 1/k! from k = 13 down: for |r| <= ln(2)/2 the rest of the series is below 5e-18
_SERIES: Final = tuple(
    1.0 / f for f in (6227020800, 479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1)
)


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """One block of four 64-bit random words (Philox 4x64, 10 rounds)."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & _MASK, (a >> 64) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 bits that belongs to this seed and position."""
    return (philox((seed & _MASK, 0), (position, 0, 0, 0))[0] >> 11) * 2.0**-53


def exp(x: Floats) -> Floats:
    """e ** x for x in [-700, 0], within 1e-15 of it, bit-identical everywhere. Shape is kept."""
    n = np.rint(x * _LOG2E)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    value = np.full_like(x, _SERIES[0])
    for term in _SERIES[1:]:
        value *= r
        value += term
    return np.ldexp(value, n.astype(np.int32))


def penalise(logits: Floats, history: Sequence[int], penalty: float) -> Floats:
    """Repetition penalty (Keskar et al., CTRL, 2019): known tokens lose, whatever the sign of their logit."""
    known = np.unique(np.asarray([t for t in history if 0 <= t < logits.size], np.int64))
    out = logits.copy()
    seen = out[known]
    out[known] = np.where(seen < 0, seen * penalty, seen / penalty)
    return out


def sample(
    logits: np.ndarray[Any, np.dtype[np.float32]], sampling: Sampling | None, position: int, history: Sequence[int]
) -> int:
    """The token at `position`.

    Args:
      logits: float32 (vocab,), finite.
      sampling: None is greedy.
      position: of the token that is picked, counted from the start of the prompt.
      history: the tokens before it (prompt and answer), for the repetition penalty.
    """
    if sampling is None:
        return int(logits.argmax())
    penalised = sampling.repetition_milli != 1000 and len(history) > 0
    if sampling.temperature_milli == 0 and not penalised:
        return int(logits.argmax())
    scores: Floats = logits.astype(np.float64)
    if penalised:
        scores = penalise(scores, history, sampling.repetition_milli / 1000)
    if sampling.temperature_milli == 0:
        return int(scores.argmax())
    scores = scores / (sampling.temperature_milli / 1000)
    tokens = _candidates(scores, sampling.top_k)
    weights = exp(scores[tokens] - scores.max())
    if sampling.top_p_micro < 1_000_000:
        tokens, weights = _nucleus(tokens, weights, sampling.top_p_micro / 1_000_000)
    sums = np.cumsum(weights)
    drawn = np.searchsorted(sums, sums[-1] * uniform(sampling.seed, position), side="right")
    return int(tokens[min(int(drawn), len(tokens) - 1)])


def _candidates(scores: Floats, top_k: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens that may be drawn, in ascending order: within reach of the best, and not below the k-th best."""
    floor = scores.max() - _REACH
    if 0 < top_k < scores.size:
        floor = max(floor, np.partition(scores, scores.size - top_k)[scores.size - top_k])
    return np.flatnonzero(scores >= floor)


def _nucleus(
    tokens: np.ndarray[Any, np.dtype[np.int64]], weights: Floats, top_p: float
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], Floats]:
    """The smallest set of best tokens that holds `top_p` of the mass (Holtzman et al., 2019); at least one.

    Sorting a whole vocabulary takes as long as a decode step. Tokens below 1 / n of the mass that goes can't add
    up to more than it, so they are left out before.
    """
    total = np.cumsum(weights)[-1]
    heavy = np.flatnonzero(weights >= total * (1.0 - top_p) / weights.size)
    order = heavy[np.argsort(-weights[heavy], kind="stable")]  # ties: the lower token first
    sums = np.cumsum(weights[order])
    keep = 1 + int(np.searchsorted(sums[:-1], total * top_p, side="left"))
    return tokens[order[:keep]], weights[order[:keep]]
