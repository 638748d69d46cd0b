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
    repetition_milli=st.integers(100, 10_000),
)


@settings(max_examples=200)
@given(logits=logits, sampling=samplings, position=st.integers(0, 1 << 20), history=st.lists(st.integers(0, 80)))
def test_allowed(logits: np.ndarray[Any, Any], sampling: Sampling, position: int, history: list[int]) -> None:
    before = logits.copy()
    token = sample(logits, sampling, position, history)
    assert 0 <= token < len(logits)
    assert sample(logits, sampling, position, history) == token
    np.testing.assert_array_equal(logits, before)
    scores = logits.astype(np.float64)
    for known in {t for t in history if t < len(scores)}:
        penalty = sampling.repetition_milli / 1000
        scores[known] = scores[known] * penalty if scores[known] < 0 else scores[known] / penalty
    if sampling.temperature_milli == 0:
        assert scores[token] == scores.max()
        return
    if 0 < sampling.top_k < len(scores):
        assert scores[token] >= np.sort(scores)[-sampling.top_k]
    weights = np.exp((scores - scores.max()) / (sampling.temperature_milli / 1000))
    if 0 < sampling.top_k < len(scores):
        weights[scores < np.sort(scores)[-sampling.top_k]] = 0
    better = weights[weights > weights[token]].sum() / weights.sum()
    assert better <= sampling.top_p_micro / 1e6 + 1e-9
