"""Picks a token from logits: the same (seed, position, logits, history) gives the same token on every node.

Order and meaning follow transformers' logits processors: repetition penalty, temperature, top-k, top-p, min-p.
Presence and frequency penalties are those of the OpenAI API: they come after the repetition penalty and count the
answer alone.
Random numbers are counter-based (Philox 4x64-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011), keyed by the seed and counted by the position, so a replayed step draws the same number. Everything that
decides is made of additions, multiplications and comparisons of float64, which IEEE 754 rounds the same
everywhere; numpy's own `exp` differs in the last bit between processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.ma  # `np.unique` imports it when it is first called: too late in a confined engine

from meshnode.core.errors import Declined
from protocols.enginewire.messages import BAD_INPUT
from protocols.pipe.messages import Chance, Sampling

Floats = np.ndarray[Any, np.dtype[np.float64]]

_MASK: Final = (1 << 64) - 1
_MULTIPLIERS: Final = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL: Final = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_REACH: Final = 32.0  # nats below the best: a token there has 1e-14 of its chance and is left out
_MOST_NATS: Final = 1e9  # of a chance; a logit may be -infinity

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


def discourage(logits: Floats, answer: Sequence[int], presence: float, frequency: float) -> Floats:
    """Presence and frequency penalty: off the logits of what the answer has, once and for each time it has it."""
    known, counts = np.unique(np.asarray([t for t in answer if 0 <= t < logits.size], np.int64), return_counts=True)
    out = logits.copy()
    out[known] -= presence + frequency * counts
    return out


def needs_history(sampling: Sampling | None) -> bool:
    """Whether the tokens before a token have a say in it."""
    return sampling is not None and (
        sampling.repetition_milli != 1000 or sampling.presence_milli != 0 or sampling.frequency_milli != 0
    )


def sample(
    logits: np.ndarray[Any, np.dtype[np.float32]],
    sampling: Sampling | None,
    position: int,
    history: Sequence[int],
    answer: Sequence[int] = (),
) -> int:
    """The token at `position`.

    Args:
      logits: float32 (vocab,), finite.
      sampling: None is greedy.
      position: of the token that is picked, counted from the start of the prompt.
      history: the tokens before it (prompt and answer), for the repetition penalty.
      answer: those of them that were sampled, for the presence and frequency penalties.
    """
    if sampling is None:
        return int(logits.argmax())
    penalised = needs_history(sampling) and len(history) > 0
    if sampling.temperature_milli == 0 and not penalised:
        return int(logits.argmax())
    scores: Floats = logits.astype(np.float64)
    if penalised:
        if sampling.repetition_milli != 1000:
            scores = penalise(scores, history, sampling.repetition_milli / 1000)
        scores = discourage(scores, answer, sampling.presence_milli / 1000, sampling.frequency_milli / 1000)
    if sampling.temperature_milli == 0:
        return int(scores.argmax())
    scores = scores / (sampling.temperature_milli / 1000)
    tokens = _candidates(scores, sampling.top_k)
    weights = exp(scores[tokens] - scores.max())
    if sampling.top_p_micro < 1_000_000:
        tokens, weights = _nucleus(tokens, weights, sampling.top_p_micro / 1_000_000)
    if sampling.min_p_micro:
        likely = weights >= sampling.min_p_micro / 1_000_000 * weights.max()
        tokens, weights = tokens[likely], weights[likely]
    sums = np.cumsum(weights)
    drawn = np.searchsorted(sums, sums[-1] * uniform(sampling.seed, position), side="right")
    return int(tokens[min(int(drawn), len(tokens) - 1)])


def masked(logits: np.ndarray[Any, np.dtype[np.float32]], mask: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The logits of the tokens that may be drawn; -infinity for all others.

    mask: a bit for each token, the lowest bit of the first byte for token 0; those beyond the vocabulary are ignored.

    Raises Declined `bad-input`: it is too short, or allows no token that has a chance.
    """
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    if bits.size < logits.size:
        raise Declined(BAD_INPUT, f"A mask has {bits.size} bits for a vocabulary of {logits.size} tokens.")
    allowed = np.where(bits[: logits.size] == 1, logits, np.float32(-np.inf))
    if not np.isfinite(allowed.max()):
        raise Declined(BAD_INPUT, "A mask allows none of the tokens.")
    return allowed


def chances(logits: np.ndarray[Any, np.dtype[np.float32]], token: int, most: int) -> tuple[Chance, ...]:
    """How probable the model alone held `token`, then its most - 1 best tokens; with `most` 0 nothing.

    logits: float32 (vocab,), finite.
    """
    if not most:
        return ()
    scores: Floats = logits.astype(np.float64)
    best = scores.max()
    total = best + np.log(
        np.exp(scores - best).sum()
    )  # numpy's own: nothing is drawn by it, and it is 20 times as fast
    few = min(most - 1, scores.size)
    chosen = np.argpartition(-scores, few - 1)[:few] if few else np.empty(0, np.int64)
    chosen = chosen[np.lexsort((chosen, -scores[chosen]))]  # ties: the lower token first
    return tuple(
        Chance(token=int(t), nano_nats=max(0, round(min(total - scores[t], _MOST_NATS) * 1e9)))
        for t in (token, *chosen)
    )


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
