"""Each supported architecture, as a small random model: whole and in pieces equal to transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshnode.core.errors import ModelError
from tests.model.cutting import Pieces, published, random_checkpoint, reference_greedy, reference_logits

pytestmark = pytest.mark.model

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 32},
    "phi3": {},
}
PROMPT = [int(t) for t in np.random.default_rng(3).integers(2, 256, 50)]
EVERYWHERE = (1, 2, 3)


def make(name: str, folder: Path, out: Path, *variants: str) -> Any:
    model = random_checkpoint(folder, name.split("-")[0], **ARCHITECTURES[name])
    published(folder, out, *variants)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_published_graph_equals_transformers(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path / "in", tmp_path / "out", "fp32")
    whole, three = Pieces(tmp_path / "out", "fp32", ()), Pieces(tmp_path / "out", "fp32", (1, 3))
    expected = reference_logits(model, PROMPT)
    logits = whole.step(PROMPT, 0)
    assert np.abs(logits - expected).max() <= 1e-4
    assert np.array_equal(three.step(PROMPT, 0), logits)
    tokens = reference_greedy(model, PROMPT, 24)
    assert whole.greedy(PROMPT, 24) == tokens
    assert three.greedy(PROMPT, 24) == tokens


@pytest.mark.parametrize("variant", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "phi3"])
def test_any_cut_gives_the_same_bits_at_every_optimisation_level(name: str, variant: str, tmp_path: Path) -> None:
    make(name, tmp_path / "in", tmp_path / "out", variant)
    for level in ("BASIC", "EXTENDED", "ALL"):
        whole = Pieces(tmp_path / "out", variant, (), level=level)
        every = Pieces(tmp_path / "out", variant, EVERYWHERE, level=level)
        assert np.array_equal(whole.step(PROMPT, 0), every.step(PROMPT, 0))
        assert np.array_equal(whole.step([5], len(PROMPT)), every.step([5], len(PROMPT)))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3", "phi3"])
def test_quantised_variants_stay_near(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path / "in", tmp_path / "out", "int8", "int4")
    expected = reference_logits(model, PROMPT)
    scale = float(expected.std())
    for variant, most in (("int8", 0.05), ("int4", 0.5)):
        logits = Pieces(tmp_path / "out", variant, (2,)).step(PROMPT, 0)
        assert np.sqrt(np.square(logits - expected).mean()) <= most * scale, variant


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "bert"])
def test_an_architecture_that_can_not_be_cut_is_named(family: str, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "in", family)
    with pytest.raises(ModelError, match=f"architecture '{family}'"):
        published(tmp_path / "in", tmp_path / "out", "fp32")
