"""Model families as small random models: those that must run, and those that are refused with the figures."""

from __future__ import annotations

from typing import Any

GROWTH = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}
EXPERTS = {"num_experts_per_tok": 2}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
# Widths of heads that the kernel can't take as they are, windows in some layers, and every part that families have
# apart.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"mlp_bias": True, "attention_bias": True},
    "llama-heads100": {"head_dim": 100},
    "llama-heads120": {"head_dim": 120},
    "llama-heads20": {"head_dim": 20},
    "qwen2": {},
    "qwen2-window": WINDOW,
    "qwen2-types": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 32},
    "phi3": {},
    "phi3-window": {"sliding_window": 24},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 24},
    "gemma3_text": {"head_dim": 16, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "smollm3": {},
    "smollm3-window": {"use_sliding_window": True, "sliding_window": 24},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 24},
    "granite": GRANITE,
    "granitemoe": {"num_local_experts": 4, **EXPERTS, **GRANITE},
    "qwen2_moe": {"num_experts": 4, **EXPERTS, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"num_experts": 4, **EXPERTS, "moe_intermediate_size": 48, "head_dim": 32},
    "mixtral": {"num_local_experts": 4, **EXPERTS, "sliding_window": None},
    "apertus": {},
    "arcee": {},
    "ministral3": {},
    "ministral3-growth": {"head_dim": 16, "rope_parameters": GROWTH},
    "starcoder2": {"use_bias": True, "sliding_window": 24},
    "seed_oss": {"head_dim": 32},
    "cohere": {},
    "cohere2": {"sliding_window": 24},
    "exaone4": {"sliding_window": 24},
    "helium": {"head_dim": 16},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "phi": {},
    "stablelm": {},
    "nemotron": {},
    "ernie4_5": {"head_dim": 16},
    "olmoe": {"num_experts": 4, **EXPERTS},
    "phimoe": {"num_local_experts": 4, **EXPERTS},
}
# What transformers and the graph builder both know, but don't see alike.
REFUSED: dict[str, dict[str, Any]] = {
    "hunyuan_v1_dense": {"head_dim": 16},
    "granitemoeshared": {"num_local_experts": 4, **EXPERTS, "shared_intermediate_size": 32},
}
# For people; the key is the model_type of transformers.
ABOUT = {
    "llama": "Llama 2, 3, 3.1, 3.2, 3.3; many others",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "mistral": "Mistral 7B, Nemo, Small",
    "phi3": "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, text only",
    "smollm3": "SmolLM3",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "granite": "Granite 3",
    "granitemoe": "Granite-MoE",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
    "apertus": "Apertus",
    "arcee": "Arcee AFM",
    "ministral3": "Ministral 3",
    "starcoder2": "StarCoder2",
    "seed_oss": "Seed-OSS",
    "cohere": "Command R",
    "cohere2": "Command R7B, Command A",
    "exaone4": "EXAONE 4",
    "helium": "Helium",
    "glm": "GLM-4-9B",
    "glm4": "GLM-4-0414",
    "phi": "Phi-1, Phi-1.5, Phi-2",
    "stablelm": "StableLM 2",
    "nemotron": "Nemotron, Minitron",
    "ernie4_5": "ERNIE 4.5, dense",
    "olmoe": "OLMoE",
    "phimoe": "Phi-3.5-MoE",
    "hunyuan_v1_dense": "Hunyuan, dense",
    "granitemoeshared": "Granite-MoE with shared experts",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX, Pythia",
    "gpt_oss": "gpt-oss",
    "falcon": "Falcon",
    "lfm2": "LFM2",
    "mamba": "Mamba",
}
# What can't be built or cut at all: refused before anything is compared.
UNBUILT: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": {"num_local_experts": 4, **EXPERTS, "sliding_window": 24, "head_dim": 16},
    "falcon": {},
    "lfm2": {},
    "mamba": {},
}
