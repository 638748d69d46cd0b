"""The publisher from end to end, with the demonstration model: sizes, quality, tokens, and the child process."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer

from meshnode.core.errors import ConfigError, ModelError
from meshnode.publisher import release as releasing
from meshnode.publisher.quality import sample_tokens
from meshnode.publisher.release import run_publisher
from tests.model.cutting import Pieces, published, random_checkpoint, reference_greedy, whole_model
from tests.model.real_mesh import VARIANTS, example_folder

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def example() -> Path:
    return example_folder()


def index_of(folder: Path) -> dict[str, Any]:
    index = json.loads((folder / "index.json").read_text())
    assert isinstance(index, dict)
    return index


def sizes(folder: Path, variant: str) -> int:
    """Bytes on disk of everything that belongs to one variant."""
    return (
        sum(p.stat().st_size for p in (folder / variant).iterdir())
        + (folder / f"graph-{variant}.onnx.zlib").stat().st_size
    )


def test_quantised_variants_are_small(example: Path) -> None:
    assert sizes(example, "int4") <= 100_000_000
    assert sizes(example, "int8") <= 160_000_000
    assert not (example / "int4" / "head.safetensors").exists()  # tied: the table is stored once


def test_graphs_are_small_beside_one_layer(example: Path) -> None:
    for variant in VARIANTS:
        entry = index_of(example)["variants"][variant]
        assert entry["graph"]["size"] < 0.01 * entry["layers"][0]["size"], variant


def test_quality_is_measured_and_near_the_reference(example: Path) -> None:
    for variant, most in (("fp32", 1.0005), ("int8", 1.02), ("int4", 1.18)):
        quality = index_of(example)["variants"][variant]["quality"]
        assert quality["tokens"] > 700
        ratio = quality["perplexity_milli"] / quality["reference_milli"]
        print(variant, quality["perplexity_milli"] / 1000, "reference", quality["reference_milli"] / 1000)
        assert 0.97 < ratio < most, variant


def test_the_index_says_what_a_node_must_know(example: Path) -> None:
    index = index_of(example)
    assert index["name"] == "smollm2-135m-instruct"
    facts = index["architecture"]
    assert (facts["layers"], facts["hidden"], facts["vocab"], facts["context"]) == (30, 576, 49152, 8192)
    assert set(index["files"]) >= {"config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "quality.json"}
    assert "Apache License" in (example / "LICENSE").read_text()
    tokenizer = Tokenizer.from_file(str(example / "tokenizer.json"))
    assert tokenizer.token_to_id("<|im_end|>") in facts["eos_ids"]


def test_fp32_says_what_transformers_says(example: Path) -> None:
    tokenizer = Tokenizer.from_file(str(example / "tokenizer.json"))
    template = jinja2.Environment().from_string((example / "chat_template.jinja").read_text())
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.encode(template.render(messages=messages, add_generation_prompt=True)).ids
    expected = reference_greedy(whole_model("example:smollm2"), prompt, 32)
    assert Pieces(example, "fp32", ()).greedy(prompt, 32) == expected
    assert Pieces(example, "fp32", (9, 22)).greedy(prompt, 32) == expected
    assert "Paris" in tokenizer.decode(expected)


@pytest.mark.long
def test_quantised_variants_mostly_choose_the_same_token(example: Path) -> None:
    tokens = sample_tokens(example / "tokenizer.json", 8192)[:400]
    best = Pieces(example, "fp32", ()).step(tokens, 0).argmax(axis=1)
    for variant, least in (("int8", 0.92), ("int4", 0.68)):
        same = (Pieces(example, variant, ()).step(tokens, 0).argmax(axis=1) == best).mean()
        print(variant, f"{same:.3f} of the most likely tokens are those of fp32")
        assert same >= least


def digests(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.long
def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "in", "qwen2", tie_word_embeddings=True)
    run_publisher(str(tmp_path / "in"), tmp_path / "first", VARIANTS)
    published(tmp_path / "in", tmp_path / "second", *VARIANTS)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_progress_is_told(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "in", "llama")
    seen: list[tuple[str, str, int, int]] = []
    run_publisher(str(tmp_path / "in"), tmp_path / "out", ["fp32"], lambda *step: seen.append(step))
    assert list(dict.fromkeys(s[0] for s in seen)) == ["open", "graph", "reference", "weights", "quality"]
    weights = [s[2:] for s in seen if s[0] == "weights"]
    assert weights == [(done, 6) for done in range(7)]  # four layers and two ends


def test_the_sentence_of_the_child_arrives(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no model at"):
        run_publisher(str(tmp_path / "nowhere"), tmp_path / "out", ["int4"])
    with pytest.raises(ConfigError, match="no variant 'int2'"):
        run_publisher(str(tmp_path / "nowhere"), tmp_path / "out", ["int2"])


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releasing, "NEEDED", ("json", "no_such_torch"))
    with pytest.raises(ModelError, match=r"\(no_such_torch\).*pip install 'meshnode\[publish\]'"):
        run_publisher("example:smollm2", tmp_path / "out", ["int4"])


def test_a_child_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho 'what went wrong' >&2\nkill -9 $$\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    with pytest.raises(ModelError, match=r"killed by signal 9; .*out of memory\): what went wrong"):
        run_publisher("example:smollm2", tmp_path / "out", ["int4"])
