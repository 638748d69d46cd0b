"""Sampling: known answers, transformers' meaning of every parameter, and frequencies that are the probabilities."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from meshnode.engine.sampling import chances, exp, philox, sample, uniform
from protocols.pipe.messages import Chance, Sampling

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(11)
LOGITS: Array = (RNG.standard_normal(500) * 3).astype(np.float32)


def softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum())


def drawn(logits: Array, sampling: Sampling, count: int = 4000, history: tuple[int, ...] = ()) -> Counter[int]:
    return Counter(sample(logits, sampling, position, history) for position in range(count))


def test_philox_known_answers() -> None:
    """Random123's kat_vectors, philox4x64 with 10 rounds."""
    ones = (1 << 64) - 1
    assert philox((0, 0), (0, 0, 0, 0)) == (
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    )
    assert philox((ones, ones), (ones, ones, ones, ones)) == (
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    )


def test_philox_is_numpys() -> None:
    for seed in (0, 1, 2**63 - 1):
        for position in (1, 7, 100_000):
            theirs = np.random.Philox(key=seed, counter=position - 1).random_raw(4)
            assert philox((seed, 0), (position, 0, 0, 0)) == tuple(int(w) for w in theirs)


def test_uniform_depends_on_seed_and_position() -> None:
    values = [uniform(seed, position) for seed in range(50) for position in range(50)]
    assert len(set(values)) == len(values)
    assert all(0 <= v < 1 for v in values)
    assert abs(np.mean(values) - 0.5) < 0.02


def test_exp_is_exp() -> None:
    x = np.concatenate([-RNG.random(10_000) * 50, [0.0, -1e-300, -700.0]])
    np.testing.assert_allclose(exp(x), np.exp(x), rtol=1e-15)
    assert exp(np.zeros(1))[0] == 1.0


def test_greedy() -> None:
    best = int(LOGITS.argmax())
    assert sample(LOGITS, None, 3, ()) == best
    assert sample(LOGITS, Sampling(seed=5), 3, (best,)) == best
    assert sample(np.array([1, 7, 7, 2], np.float32), None, 0, ()) == 1  # ties: the first


def test_same_place_same_token() -> None:
    sampling = Sampling(seed=5, temperature_milli=1000)
    assert drawn(LOGITS, sampling, 50) == drawn(LOGITS, sampling, 50)
    first = [sample(LOGITS, sampling, p, ()) for p in range(50)]
    other = [sample(LOGITS, Sampling(seed=6, temperature_milli=1000), p, ()) for p in range(50)]
    assert first != other


@pytest.mark.parametrize("temperature", [500, 1000, 2000])
def test_frequencies_are_probabilities(temperature: int) -> None:
    logits = LOGITS[:20]
    counts = drawn(logits, Sampling(seed=1, temperature_milli=temperature))
    wanted = softmax(logits.astype(np.float64) / (temperature / 1000))
    for token, probability in enumerate(wanted):
        # five standard deviations of a binomial; seeds are fixed, so this passes always or never
        assert abs(counts[token] / 4000 - probability) < 5 * (probability / 4000) ** 0.5 + 1e-3


def test_top_k_is_a_cut_of_the_scores() -> None:
    logits = LOGITS[:30]
    counts = drawn(logits, Sampling(seed=1, temperature_milli=3000, top_k=5))
    assert set(counts) == set(np.argsort(-logits)[:5].tolist())
    assert set(drawn(logits, Sampling(seed=1, temperature_milli=3000, top_k=1), 50)) == {int(logits.argmax())}
    # as in transformers, what equals the k-th best stays
    assert set(drawn(np.array([2, 1, 1, 0], np.float32), Sampling(seed=1, temperature_milli=1000, top_k=2))) == {
        0,
        1,
        2,
    }


@pytest.mark.parametrize("top_p", [1, 100_000, 500_000, 900_000, 999_999])
def test_top_p_is_the_smallest_set_that_holds_the_mass(top_p: int) -> None:
    logits = LOGITS[:30]
    scores = softmax(logits.astype(np.float64))
    order = np.argsort(-scores)
    before = np.cumsum(scores[order]) - scores[order]  # mass of the better ones
    nucleus = {int(t) for t, mass in zip(order, before, strict=True) if mass < top_p / 1e6}
    counts = drawn(logits, Sampling(seed=2, temperature_milli=1000, top_p_micro=top_p))
    assert set(counts) <= nucleus
    assert {t for t in nucleus if scores[t] > 0.005} <= set(counts)


def test_repetition_penalty_as_in_transformers() -> None:
    """score / penalty when positive, score * penalty when negative, once per token however often it occurred."""
    logits = np.array([2.0, 1.9, -1.0, -1.1], np.float32)
    assert sample(logits, Sampling(seed=0, repetition_milli=1200), 9, (0, 0, 0)) == 1
    assert sample(logits[2:], Sampling(seed=0, repetition_milli=1200), 9, (0,)) == 1
    assert sample(logits, Sampling(seed=0, repetition_milli=1200), 9, ()) == 0
    assert sample(logits, Sampling(seed=0, repetition_milli=900), 9, (1,)) == 1  # below 1 it rewards
    assert sample(logits, Sampling(seed=0, repetition_milli=1200), 9, (0, 99, -1)) == 1  # unknown ids are ignored


def test_a_large_vocabulary_draws_like_a_small_one() -> None:
    """What can't be drawn is left out early; the rest keeps its chances."""
    few = LOGITS[:8]
    many = np.full(50_000, -60.0, np.float32)
    many[1000:9000:1000] = few
    for sampling in (
        Sampling(seed=3, temperature_milli=1000),
        Sampling(seed=3, temperature_milli=1000, top_p_micro=900_000),
    ):
        for position in range(100):
            small = sample(few, sampling, position, ())
            assert sample(many, sampling, position, ()) == 1000 * (small + 1)


@pytest.mark.parametrize("min_p", [1, 50_000, 300_000, 1_000_000])
def test_min_p_is_a_share_of_the_best_ones_probability(min_p: int) -> None:
    logits = LOGITS[:30]
    scores = softmax(logits.astype(np.float64) / 1.5)
    likely = set(np.flatnonzero(scores >= min_p / 1e6 * scores.max()).tolist())
    counts = drawn(logits, Sampling(seed=2, temperature_milli=1500, min_p_micro=min_p))
    assert set(counts) <= likely
    assert {t for t in likely if scores[t] > 0.005} <= set(counts)


def test_presence_and_frequency_count_the_answer_alone() -> None:
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence."""
    logits = np.array([2.0, 1.3, 0.8], np.float32)

    def best(answer: tuple[int, ...], presence: int = 0, frequency: int = 0) -> int:
        sampling = Sampling(seed=0, presence_milli=presence, frequency_milli=frequency)
        return sample(logits, sampling, 9, (0, 0, *answer), answer)

    assert best((), presence=2000, frequency=2000) == 0, "the prompt has no say"
    assert best((0,), presence=800) == 1
    assert best((0, 0, 0), presence=600) == 0, "once, however often"
    assert [best((0,) * count, frequency=300) for count in range(4)] == [0, 0, 0, 1]
    assert best((0, 0, 1), presence=500, frequency=400) == 2, "2.0 - 1.3, 1.3 - 0.9, 0.8"
    assert best((2, 2, 2, 2, 9, -1), frequency=-500) == 2, "below zero it rewards; unknown ids are ignored"


def test_chances_are_the_models_own() -> None:
    """Of the distribution before everything, the token's first; exact to a nano-nat."""
    exact = -np.log(softmax(LOGITS.astype(np.float64)))
    order = np.argsort(exact, kind="stable")
    told = chances(LOGITS, 17, 21)
    assert [chance.token for chance in told] == [17, *order[:20].tolist()]
    np.testing.assert_allclose([chance.nano_nats / 1e9 for chance in told], exact[[17, *order[:20]]], atol=1e-9)
    assert chances(LOGITS, 17, 1) == told[:1]
    assert chances(LOGITS, 17, 0) == ()
    assert [chance.token for chance in chances(LOGITS[:3], 1, 21)[1:]] == np.argsort(-LOGITS[:3]).tolist()


def test_chances_of_extremes() -> None:
    logits = np.array([-np.inf, 3.0, 3.0], np.float32)
    worst, *best = chances(logits, 0, 3)
    assert worst == Chance(token=0, nano_nats=10**18), "no number says how unlikely it is"
    assert best == [Chance(token=t, nano_nats=round(np.log(2) * 1e9)) for t in (1, 2)]
