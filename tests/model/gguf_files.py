"""Small random models as GGUF files, named and laid out as llama.cpp's converter does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import log, pi
from pathlib import Path
from typing import Any

import numpy as np

from tests.model.cutting import byte_tokenizer

Array = np.ndarray[Any, Any]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps.weight",  # split below
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate.": "ffn_gate_inp.",
}
TWO_NORMS = {"post_attention_layernorm": "ffn_norm"}
FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
INTERLEAVED = ("llama", "granite", "smollm3")
Keys = dict[str, Any]


def write_gguf(
    model: Any,
    path: Path,
    architecture: str,
    keys: Keys | None = None,
    *,
    tensors: dict[str, Array] | None = None,
    parts: int = 1,
    kind: str = "F32",
) -> list[Path]:
    """Write a model; gives the files.

    Args:
      keys: more settings of the architecture, by the end of their names.
      tensors: more tensors.
      parts: of a split model.
      kind: how matrices are quantised: a name of ggml.
    """
    values = {**_tensors(model, architecture), **(tensors or {})}
    names = list(values)
    paths = [path]
    if parts > 1:
        paths = [path.with_name(f"{path.stem}-{k + 1:05}-of-{parts:05}.gguf") for k in range(parts)]
    for k, part in enumerate(paths):
        own = names[k::parts]
        split = {"split.no": k, "split.count": parts, "split.tensors.count": len(names)} if parts > 1 else {}
        _write(part, model.config, architecture, keys or {}, {n: values[n] for n in own}, split, kind, first=k == 0)
    return paths


def _write(
    path: Path,
    config: Any,
    architecture: str,
    keys: Keys,
    values: dict[str, Array],
    split: dict[str, int],
    kind: str,
    *,
    first: bool,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    for key, number in split.items():
        (writer.add_int32 if key.endswith("tensors.count") else writer.add_uint16)(key, number)
    if first:
        _settings(writer, config, architecture, keys)
    quantised = gguf.GGMLQuantizationType[kind]
    for name, value in values.items():
        if kind != "F32" and value.ndim > 1 and value.shape[-1] % 32 == 0:
            writer.add_tensor(name, gguf.quantize(value, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _settings(writer: Any, config: Any, architecture: str, keys: Keys) -> None:
    rope = config.rope_parameters
    theta = rope["rope_theta"] if "rope_theta" in rope else rope["full_attention"]["rope_theta"]
    settings: Keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": theta,
    }
    if getattr(config, "head_dim", None):
        settings |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    for key, value in {**settings, **keys}.items():
        _add(writer)[type(value)](f"{architecture}.{key}", value)
    letters = sorted(json.loads(byte_tokenizer())["model"]["vocab"])
    letters[-1] = letters[0] + letters[1]  # there is no vocabulary without a merge in GGUF
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(letters)
    writer.add_token_types([1] * len(letters))
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _add(writer: Any) -> dict[type, Callable[..., None]]:
    return {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        bool: writer.add_bool,
        list: writer.add_array,
    }


def _tensors(model: Any, architecture: str) -> dict[str, Array]:
    four = architecture in ("gemma2", "gemma3", "olmo2")
    names = {**NAMES, **(FOUR_NORMS if four else TWO_NORMS)}
    config = model.config
    out: dict[str, Array] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if architecture in INTERLEAVED and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            rows = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
            values = rows.swapaxes(1, 2).reshape(values.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "ffn_gate_up_exps" in name:
            gate, up = np.split(values, 2, axis=1)
            out[name.replace("gate_up", "gate")] = np.ascontiguousarray(gate)
            out[name.replace("gate_up", "up")] = np.ascontiguousarray(up)
        else:
            out[name] = np.ascontiguousarray(values)
    return out


def llama3_factors(scale: dict[str, Any], width: int) -> Array:
    """rope_freqs.weight of llama.cpp's converter for `rope_type: llama3`."""
    low, high, factor = scale["low_freq_factor"], scale["high_freq_factor"], scale["factor"]
    out = []
    for pair in range(width // 2):
        length = 2 * pi * scale["rope_theta"] ** (2 * pair / width)
        share = (scale["original_max_position_embeddings"] / length - low) / (high - low)
        share = min(1.0, max(0.0, share))
        out.append(1 / ((1 - share) / factor + share))
    return np.array(out, np.float32)


def yarn_keys(factor: float, original: int, attention: float | None = None) -> Keys:
    """What the converter writes for `rope_type: yarn`."""
    keys: Keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
    }
    if attention is not None:  # it multiplies what llama.cpp computes itself
        keys["rope.scaling.yarn_attn_factor"] = attention / (0.1 * log(factor) + 1)
    return keys
