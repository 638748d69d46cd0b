"""Each supported architecture, as a small random model: whole and in pieces equal to transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshnode.core.errors import ModelError
from meshnode.engine.graph_file import read_graph
from meshnode.engine.rotary import is_placeholder, parse
from meshnode.publisher import publish as publishing
from meshnode.publisher.frequencies import Frequencies
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
FACTORS = [1 + 0.1 * i for i in range(8)]
ROTARY: dict[str, dict[str, Any]] = {
    "llama-linear": {"rope_type": "linear", "factor": 4.0},
    "llama-dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama-llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "qwen2-yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "phi3-longrope": {
        "rope_type": "longrope",
        "short_factor": FACTORS,
        "long_factor": [2 * f for f in FACTORS],
        "original_max_position_embeddings": 128,
    },
    "phi3-partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
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


@pytest.mark.parametrize("name", ROTARY)
def test_every_kind_of_rotary_positions_equals_transformers(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rope_parameters": {"rope_theta": 10000.0, **ROTARY[name]}}
    if name == "phi3-longrope":
        settings["original_max_position_embeddings"] = 128
    if name == "phi3-partial":
        settings["hidden_size"] = 128
    model = random_checkpoint(tmp_path / "in", name.split("-")[0], **settings)
    index = published(tmp_path / "in", tmp_path / "out", "fp32")
    context = index["architecture"]["context"]
    assert context == (128 if name == "phi3-longrope" else 256)  # from there on it takes the long factors
    prompt = [int(t) for t in np.random.default_rng(4).integers(2, 256, context - 8)]
    logits = Pieces(tmp_path / "out", "fp32", (1, 3)).step(prompt, 0)
    assert np.abs(logits - reference_logits(model, prompt)).max() <= 1e-5
    graph = read_graph(tmp_path / "out" / index["variants"]["fp32"]["graph"]["path"]).graph
    tables = [parse(t) for t in graph.initializer if is_placeholder(t)]
    assert sorted(t.function for t in tables) == ["cos", "sin"]
    assert all(t.table().shape == (context, 8) for t in tables)


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


@pytest.mark.parametrize("found", [None, Frequencies(np.ones(8, np.float32), 1.0, certain=False)])
def test_tables_stay_where_transformers_has_other_ones(
    found: Frequencies | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "rotary_frequencies", lambda folder: found)
    model = make("llama", tmp_path / "in", tmp_path / "out", "fp32")
    graph = read_graph(next((tmp_path / "out").glob("graph-*"))).graph
    assert not any(is_placeholder(t) for t in graph.initializer)
    logits = Pieces(tmp_path / "out", "fp32", (1, 3)).step(PROMPT, 0)
    assert np.abs(logits - reference_logits(model, PROMPT)).max() <= 1e-4
