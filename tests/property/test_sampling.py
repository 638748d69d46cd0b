"""Sampling: any parameters over any logits give a token that transformers' rules allow."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meshnode.engine.sampling import sample
from protocols.pipe.messages import Sampling

logits = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-80, 80, width=32))
samplings = st.builds(
    Sampling,
    seed=st.integers(0, (1 << 63) - 1),
    temperature_milli=st.integers(0, 10_000),
    top_k=st.integers(0, 70),
    top_p_micro=st.integers(1, 1_000_000),
    min_p_micro=st.integers(0, 1_000_000),
    repetition_milli=st.integers(100, 10_000),
    presence_milli=st.integers(-2000, 2000),
    frequency_milli=st.integers(-2000, 2000),
)


@settings(max_examples=200)
@given(
    logits=logits,
    sampling=samplings,
    position=st.integers(0, 1 << 20),
    prompt=st.lists(st.integers(0, 80)),
    answer=st.lists(st.integers(0, 80)),
)
def test_allowed(
    logits: np.ndarray[Any, Any], sampling: Sampling, position: int, prompt: list[int], answer: list[int]
) -> None:
    history = [*prompt, *answer]
    before = logits.copy()
    token = sample(logits, sampling, position, history, answer)
    assert 0 <= token < len(logits)
    assert sample(logits, sampling, position, history, answer) == token
    np.testing.assert_array_equal(logits, before)
    scores = logits.astype(np.float64)
    for known in {t for t in history if t < len(scores)}:
        penalty = sampling.repetition_milli / 1000
        scores[known] = scores[known] * penalty if scores[known] < 0 else scores[known] / penalty
    for known in {t for t in answer if t < len(scores)}:
        scores[known] -= (sampling.presence_milli + sampling.frequency_milli * answer.count(known)) / 1000
    if sampling.temperature_milli == 0:
        np.testing.assert_allclose(scores[token], scores.max(), rtol=1e-12, atol=1e-12)
        return
    if 0 < sampling.top_k < len(scores):
        assert scores[token] >= np.sort(scores)[-sampling.top_k] - 1e-9
    weights = np.exp((scores - scores.max()) / (sampling.temperature_milli / 1000))
    if 0 < sampling.top_k < len(scores):
        weights[scores < np.sort(scores)[-sampling.top_k] - 1e-9] = 0
    assert weights[token] >= sampling.min_p_micro / 1e6 * weights.max() - 1e-9
    better = weights[weights > weights[token]].sum() / weights.sum()
    assert better <= sampling.top_p_micro / 1e6 + 1e-9
