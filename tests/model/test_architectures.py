"""Each supported architecture, as a small random model: whole and in pieces equal to transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshnode.core.errors import ModelError
from meshnode.engine.graph_file import read_graph
from meshnode.engine.rotary import is_placeholder, parse
from meshnode.publisher import publish as publishing
from meshnode.publisher.original import Traits, read_config, read_traits
from meshnode.publisher.skeleton import build_skeleton
from meshnode.publisher.stages import Stages
from tests.long import some
from tests.model.cutting import Pieces, published, random_checkpoint, reference_greedy, reference_logits
from tests.model.families import ARCHITECTURES, REFUSED, WINDOW

pytestmark = pytest.mark.model

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


@pytest.mark.parametrize(
    "name", some(ARCHITECTURES, "llama-tied", "qwen2", "qwen3", "phi3-window", "gemma3_text", "smollm3", "mixtral")
)
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


@pytest.mark.parametrize("name", some(ROTARY, "llama-llama3", "phi3-longrope"))
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
@pytest.mark.parametrize("name", some(["llama-tied", "qwen3", "phi3"], "llama-tied"))
def test_any_cut_gives_the_same_bits_at_every_optimisation_level(name: str, variant: str, tmp_path: Path) -> None:
    make(name, tmp_path / "in", tmp_path / "out", variant)
    for level in ("BASIC", "EXTENDED", "ALL"):
        whole = Pieces(tmp_path / "out", variant, (), level=level)
        every = Pieces(tmp_path / "out", variant, EVERYWHERE, level=level)
        assert np.array_equal(whole.step(PROMPT, 0), every.step(PROMPT, 0))
        assert np.array_equal(whole.step([5], len(PROMPT)), every.step([5], len(PROMPT)))


@pytest.mark.parametrize(
    "name",
    some(
        ["llama", "llama-tied", "llama-heads20", "llama-heads100", "mixtral", "qwen2", "qwen3", "phi3"],
        "llama-tied",
        "mixtral",
    ),
)
def test_quantised_variants_stay_near(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path / "in", tmp_path / "out", "int8", "int4")
    expected = reference_logits(model, PROMPT)
    scale = float(expected.std())
    for variant, most in (("int8", 0.05), ("int4", 0.5)):
        logits = Pieces(tmp_path / "out", variant, (2,)).step(PROMPT, 0)
        assert np.sqrt(np.square(logits - expected).mean()) <= most * scale, variant


@pytest.mark.parametrize(("every", "refused"), [(50, False), (10, True)])
def test_tokens_that_chose_another_expert_are_few(
    every: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two experts that are as good as equal for a token: the other one is no mistake, but must be rare."""
    random_checkpoint(tmp_path / "in", "mixtral", **ARCHITECTURES["mixtral"])
    run = Stages.layer

    def layer(self: Stages, index: int, x: Any) -> Any:
        out = run(self, index, x)
        if index == 1 and self._once:
            out[::every] *= 1.5
        return out

    monkeypatch.setattr(Stages, "layer", layer)
    if refused:
        with pytest.raises(ModelError, match=r"layer 1 deviates by .*chosen another expert by chance"):
            published(tmp_path / "in", tmp_path / "out", "fp32")
    else:
        published(tmp_path / "in", tmp_path / "out", "fp32")


@pytest.mark.parametrize("wrong", [False, True])
def test_a_window_longer_than_the_text_is_looked_at_in_one_layer(
    wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole model runs over 768 tokens at most; here the window of the last layer is 900."""
    settings = {**WINDOW, "sliding_window": 900, "max_position_embeddings": 2048, "max_window_layers": 3}
    random_checkpoint(tmp_path / "in", "qwen2", **settings)
    windows = [layer.window for layer in read_traits(read_config(tmp_path / "in")).layers]
    assert windows == [None, None, None, 900]
    if not wrong:
        published(tmp_path / "in", tmp_path / "out", "fp32")
        return
    monkeypatch.setattr(publishing, "build_skeleton", _without_windows)
    with pytest.raises(ModelError, match=r"text of 1012 tokens, .*window of 900, layer 3 .*deviates"):
        published(tmp_path / "in", tmp_path / "out", "fp32")


def _without_windows(folder: Path, traits: Traits, *others: Any) -> Any:
    """A graph builder that forgets the windows."""
    layers = tuple(dataclasses.replace(layer, window=None) for layer in traits.layers)
    return build_skeleton(folder, dataclasses.replace(traits, layers=layers), *others)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_graph_does_not_say_alike_is_refused_with_the_figures(name: str, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "in", name, **REFUSED[name])
    figures = rf"logits differ by up to [0-9.e-]+ .*layer 0 deviates first.* of 256 .*architecture '{name}'"
    if "moe" in name:
        figures = rf"text of 256 tokens layer 0 deviates by [0-9.e-]+ of its output, .*architecture '{name}'"
    with pytest.raises(ModelError, match=figures):
        published(tmp_path / "in", tmp_path / "out", "int8")
    assert not (tmp_path / "out" / "index.json").exists()
    assert not any((tmp_path / "out").glob("*/*.safetensors"))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_an_architecture_that_can_not_be_cut_is_named(family: str, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "in", family)
    with pytest.raises(ModelError, match=f"architecture '{family}'"):
        published(tmp_path / "in", tmp_path / "out", "fp32")
