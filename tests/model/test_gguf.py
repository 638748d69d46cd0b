"""GGUF files of every kind: the same model as the folder they were made from, or a refusal that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshnode.core.errors import ModelError
from meshnode.publisher.checkpoint import open_checkpoint
from tests.model.cutting import Pieces, published, random_checkpoint, reference_logits
from tests.model.gguf_cases import CASES, UNKNOWN_KEYS
from tests.model.gguf_files import write_gguf

pytestmark = pytest.mark.model


def refused(source: Path, out: Path, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        published(source, out, "fp32")
    assert "\n" not in str(caught.value)
    assert not (out / "index.json").exists()


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_model_that_it_was_made_from(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = random_checkpoint(tmp_path / "in", case.model_type, **case.settings)
    paths = write_gguf(
        model,
        tmp_path / "x.gguf",
        case.architecture,
        case.keys,
        tensors=case.tensors(),
        parts=case.parts,
        kind=case.kind,
    )
    index = published(paths[-1], tmp_path / "out", "fp32")
    if case.kind != "F32":  # the file's own weights count
        checkpoint = open_checkpoint(str(paths[0]))
        for parameter_name, parameter in model.named_parameters():
            parameter.data = checkpoint.raw(parameter_name)
    tokens = [int(t) for t in np.random.default_rng(4).integers(2, 255, index["architecture"]["context"] - 8)]
    logits = Pieces(tmp_path / "out", "fp32", (1, 3)).step(tokens, 0)
    assert np.abs(logits - reference_logits(model, tokens)).max() <= 2e-5


@pytest.mark.parametrize("architecture", UNKNOWN_KEYS)
def test_a_setting_that_is_not_honoured_is_named(architecture: str, tmp_path: Path) -> None:
    key, value = UNKNOWN_KEYS[architecture]
    case = CASES[architecture]
    model = random_checkpoint(tmp_path / "in", case.model_type, **case.settings)
    write_gguf(model, tmp_path / "x.gguf", architecture, {**case.keys, key: value})
    refused(tmp_path / "x.gguf", tmp_path / "out", rf"the setting {architecture}\.{key} \({value:g}\)")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rope.scaling.type": "spiral"}, "positions in the way 'spiral'"),
        ({"rope.scaling.attn_factor": 1.5}, "scales its attention by 1.5"),
        ({"rope.dimension_count": 8}, "turns 8 of the 16 values"),
        ({"attention.value_length": 32}, "values of another width"),
        ({"attention.head_count_kv": [2, 2, 1, 1]}, "another llama.attention.head_count_kv in each layer"),
        ({"attention.layer_norm_rms_epsilon": "small"}, "value 'small' for llama.attention.layer_norm_rms_epsilon"),
        ({"attention.head_count": 0}, "damaged"),
    ],
)
def test_settings_that_can_not_be(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "in", "llama")
    write_gguf(model, tmp_path / "x.gguf", "llama", keys)
    refused(tmp_path / "x.gguf", tmp_path / "out", words)


def test_a_setting_that_says_what_is_done_anyway(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "in", "llama")
    keys = {
        "attention.causal": True,
        "attention.sliding_window": 0,
        "attention.head_count_kv": [2, 2, 2, 2],
        "expert_count": 0,
        "logit_scale": 1.0,
        "rope.dimension_count": 16,
        "rope.scaling.finetuned": True,
        "vocab_size": 256,
    }
    write_gguf(model, tmp_path / "x.gguf", "llama", keys)
    assert open_checkpoint(str(tmp_path / "x.gguf")).config["model_type"] == "llama"


def test_factors_of_positions_that_are_ones_are_none(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "in", "llama")
    write_gguf(model, tmp_path / "x.gguf", "llama", tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    rope = open_checkpoint(str(tmp_path / "x.gguf")).config["rope_parameters"]
    assert rope["rope_type"] == "default"


def test_a_tensor_that_is_not_known_is_named(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "in", "llama")
    write_gguf(model, tmp_path / "x.gguf", "llama", tensors={"blk.1.attn_sinks.weight": np.ones(4, np.float32)})
    refused(tmp_path / "x.gguf", tmp_path / "out", r"tensor blk\.1\.attn_sinks\.weight, which is not known")


@pytest.mark.parametrize(
    ("architecture", "way"), [("gpt2", "can't be published either"), ("glm4", "Give the Hugging")]
)
def test_another_architecture_is_named_with_the_way_out(architecture: str, way: str, tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "in", "qwen2")
    write_gguf(model, tmp_path / "x.gguf", architecture)
    refused(tmp_path / "x.gguf", tmp_path / "out", rf"GGUF architecture '{architecture}'.* {way}")


# ---------------------------------------------------------------- split files


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    model = random_checkpoint(tmp_path / "in", "llama")
    (tmp_path / "parts").mkdir()
    return write_gguf(model, tmp_path / "parts" / "small.gguf", "llama", parts=3)


def test_any_part_and_the_folder_stand_for_a_split_model(split: list[Path]) -> None:
    names = {tuple(sorted(open_checkpoint(str(p)).names())) for p in (*split, split[0].parent)}
    assert len(names) == 1
    assert open_checkpoint(str(split[1])).suggested_name == "small"


def test_missing_parts_are_named(split: list[Path], tmp_path: Path) -> None:
    split[1].unlink()
    refused(split[0], tmp_path / "out", r"one of the 3 parts.* Missing beside it: small-00002-of-00003\.gguf\.")


def test_a_part_under_another_name(split: list[Path], tmp_path: Path) -> None:
    other = split[0].rename(split[0].with_name("model.gguf"))
    refused(other, tmp_path / "out", r"part 1 of a model that is split into 3 files, but its name")


def test_parts_in_another_order(split: list[Path], tmp_path: Path) -> None:
    kept = split[1].read_bytes()
    split[1].write_bytes(split[2].read_bytes())
    split[2].write_bytes(kept)
    refused(split[0], tmp_path / "out", "is not part 2 of 3 by its metadata")


def test_a_whole_model_with_the_name_of_a_part(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "in", "llama")
    write_gguf(model, tmp_path / "x-00001-of-00002.gguf", "llama")
    refused(tmp_path / "x-00001-of-00002.gguf", tmp_path / "out", "a part of a split model by its name")
