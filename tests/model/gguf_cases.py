"""Kinds of GGUF files: what the model is, and what the file says about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.model.gguf_files import Array, Keys, llama3_factors, yarn_keys

WIDTH = 16  # of a head of these small models
SHORT = [1 + 0.1 * i for i in range(WIDTH // 2)]
LONG = [2 * f for f in SHORT]
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2}
EXPERT_KEYS: Keys = {"expert_count": 4, "expert_used_count": 2}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """Settings of transformers for scaled positions."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


@dataclass(frozen=True)
class Case:
    """One kind of file that must run."""

    about: str
    architecture: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)  # of transformers
    keys: Keys = field(default_factory=dict)
    tensors: Callable[[], dict[str, Array]] = dict
    parts: int = 1
    kind: str = "F32"


CASES: dict[str, Case] = {
    "llama": Case("Llama, Mistral", "llama", "llama"),
    "llama-tied": Case("Llama without a head of its own", "llama", "llama", {"tie_word_embeddings": True}),
    "llama-3.1": Case(
        "Llama 3.1, 3.2, 3.3: positions scaled by `rope_freqs.weight`",
        "llama",
        "llama",
        {"rope_parameters": LLAMA3},
        tensors=lambda: {"rope_freqs.weight": llama3_factors(LLAMA3, WIDTH)},
    ),
    "llama-linear": Case(
        "linear scaling of positions",
        "llama",
        "llama",
        rope("linear", factor=4.0),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "llama-linear-1": Case(
        "linear scaling by 1", "llama", "llama", {}, {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}
    ),
    "llama-window": Case(
        "a sliding window in every layer",
        "llama",
        "mistral",
        {"sliding_window": 24},
        {"attention.sliding_window": 24},
    ),
    "llama-biases": Case("Llama with biases", "llama", "llama", {"attention_bias": True}),
    "llama-split": Case("split into three files", "llama", "llama", parts=3),
    "llama-q8": Case("quantised as Q8_0", "llama", "llama", kind="Q8_0"),
    "llama-q4": Case("quantised as Q4_1", "llama", "llama", kind="Q4_1"),
    "mixtral": Case(
        "Mixtral", "llama", "mixtral", {"num_local_experts": 4, **EXPERTS, "sliding_window": None}, EXPERT_KEYS
    ),
    "qwen2": Case("Qwen2, Qwen2.5", "qwen2", "qwen2"),
    "qwen2-yarn": Case(
        "YaRN scaling of positions",
        "qwen2",
        "qwen2",
        rope("yarn", factor=4.0, original_max_position_embeddings=64),
        yarn_keys(4.0, 64),
    ),
    "qwen2-yarn-attention": Case(
        "YaRN with an attention factor of its own",
        "qwen2",
        "qwen2",
        rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.5),
        yarn_keys(4.0, 64, 1.5),
    ),
    "qwen3": Case("Qwen3", "qwen3", "qwen3", {"head_dim": 32}),
    "qwen2moe": Case(
        "Qwen2-MoE",
        "qwen2moe",
        "qwen2_moe",
        {"num_experts": 4, **EXPERTS, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 40},
        {**EXPERT_KEYS, "expert_feed_forward_length": 48, "expert_shared_feed_forward_length": 40},
    ),
    "qwen3moe": Case(
        "Qwen3-MoE",
        "qwen3moe",
        "qwen3_moe",
        {"num_experts": 4, **EXPERTS, "moe_intermediate_size": 48, "head_dim": 32, "norm_topk_prob": True},
        {**EXPERT_KEYS, "expert_feed_forward_length": 48},
    ),
    "phi3": Case("Phi-3", "phi3", "phi3"),
    "phi3-window": Case(
        "Phi-3 with its sliding window", "phi3", "phi3", {"sliding_window": 24}, {"attention.sliding_window": 24}
    ),
    "phi3-longrope": Case(
        "Phi-3.5, Phi-4-mini: positions scaled by long and short factors",
        "phi3",
        "phi3",
        {
            **rope(
                "longrope",
                short_factor=SHORT,
                long_factor=LONG,
                attention_factor=1.2,
                original_max_position_embeddings=128,
            ),
            "original_max_position_embeddings": 128,
        },
        {"rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.2},
        lambda: {
            "rope_factors_short.weight": np.array(SHORT, np.float32),
            "rope_factors_long.weight": np.array(LONG, np.float32),
        },
    ),
    "phi3-partial": Case(
        "Phi-4-mini: a part of each head is turned",
        "phi3",
        "phi3",
        {**rope("default", partial_rotary_factor=0.5), "hidden_size": 128},
        {"rope.dimension_count": 16},
    ),
    "gemma": Case("Gemma", "gemma", "gemma", {"head_dim": 16}),
    "gemma2": Case(
        "Gemma 2",
        "gemma2",
        "gemma2",
        {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
        {
            "attention.sliding_window": 24,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": Case(
        "Gemma 3",
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        {"attention.sliding_window": 24, "attention.sliding_window_pattern": 2},
    ),
    "granite": Case(
        "Granite",
        "granite",
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
        {"embedding_scale": 3.0, "logit_scale": 2.0, "residual_scale": 0.5, "attention.scale": 0.2},
    ),
    "smollm3": Case("SmolLM3", "smollm3", "smollm3"),
    "olmo2": Case("OLMo 2", "olmo2", "olmo2"),
}
# Settings that change answers and that nobody honours: a key and a value, and the architecture of the file.
UNKNOWN_KEYS: dict[str, tuple[str, Any]] = {
    "llama": ("attention.layer_indices", 3),
    "qwen2": ("attention.sliding_window", 24),
    "qwen3": ("attention.temperature_scale", 0.1),
    "phi3": ("attn_logit_softcapping", 20.0),
    "granite": ("expert_count", 4),
    "olmo2": ("attention.sliding_window", 24),
    "smollm3": ("logit_scale", 0.5),
    "gemma": ("attention.scale", 0.5),
}
