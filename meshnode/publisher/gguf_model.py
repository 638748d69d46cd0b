"""What a GGUF file says about its model, in the words of transformers: its configuration, and which tensor is which.

llama.cpp's converter renames tensors, interleaves the rows of Q and K of some architectures, adds one to Gemma's
norms and joins the experts of a layer; all of that is undone here, so that the file looks like the folder it was made
from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from meshnode.core.errors import ModelError
from meshnode.publisher.gguf import GgufFile
from meshnode.publisher.gguf_keys import Settings
from meshnode.publisher.words import first_line

Fields = dict[str, Any]
_BLOCK: Final = re.compile(r"blk\.(\d+)\.(\w+?)(?:\.(\d+))?\.(weight|bias)")
_OUTER: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FOUR_NORMS: Final = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QWEN_EXPERTS: Final = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL: Final = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_gate": "block_sparse_moe.experts.{}.w1",
    "ffn_up": "block_sparse_moe.experts.{}.w3",
    "ffn_down": "block_sparse_moe.experts.{}.w2",
}
_FACTORS: Final = frozenset(("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"))
_GEMMA2_27B, _GEMMA3_27B = 46, 62  # layers: llama.cpp scales the attention of these two by another width

_GEMMA3_PATTERN: Final = 6  # every sixth layer sees the whole text


@dataclass(frozen=True, slots=True)
class GgufWeight:
    """One tensor under its Hugging Face name."""

    tensor: str  # in the file; "": zeros
    shape: tuple[int, ...]
    part: int | None = None  # which expert of a joint tensor
    heads: int = 0  # the rows of so many heads are interleaved
    plus: float = 0.0  # what the converter added


@dataclass(frozen=True, slots=True)
class GgufModel:
    config: Fields  # of transformers
    weights: dict[str, GgufWeight]


@dataclass(frozen=True, slots=True)
class _Family:
    kind: str  # model_type of transformers
    settings: Callable[[Settings, Fields], None] = lambda settings, fields: None
    interleaved: bool = False
    norms_plus_one: bool = False
    tensors: dict[str, str] = field(default_factory=dict)  # besides _INNER


def _llama(settings: Settings, fields: Fields) -> None:
    experts = settings.count("expert_count", 0)
    used = settings.count("expert_used_count", 0)
    window = settings.count("attention.sliding_window", 0)
    if experts:
        fields |= {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": used}
        fields["sliding_window"] = window or None
    elif window:
        fields |= {"model_type": "mistral", "sliding_window": window}


def _phi3(settings: Settings, fields: Fields) -> None:
    fields["sliding_window"] = settings.count("attention.sliding_window", 0) or None
    original = settings.count("rope.scaling.original_context_length", 0)
    if original:
        fields["original_max_position_embeddings"] = original


def _gemma2(settings: Settings, fields: Fields) -> None:
    fields |= {
        "attn_logit_softcapping": settings.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": settings.number("final_logit_softcapping", 30.0),
        "sliding_window": settings.count("attention.sliding_window", 4096),
    }
    fields["query_pre_attn_scalar"] = _gemma_scalar(fields, _GEMMA2_27B)


def _gemma3(settings: Settings, fields: Fields) -> None:
    layers = fields["num_hidden_layers"]
    slides = settings.flags("attention.sliding_window_pattern", layers)
    if slides is None:
        pattern = settings.count("attention.sliding_window_pattern", _GEMMA3_PATTERN)
        slides = [not pattern or (k + 1) % pattern != 0 for k in range(layers)]
    fields |= {
        "model_type": "gemma3_text",
        "final_logit_softcapping": settings.number("final_logit_softcapping", 0.0) or None,
        "sliding_window": settings.count("attention.sliding_window"),
        "layer_types": ["sliding_attention" if s else "full_attention" for s in slides],
        "rope_parameters": {
            "full_attention": fields["rope_parameters"],
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": settings.number("rope.freq_base_swa", 10000.0),
            },
        },
    }
    fields["query_pre_attn_scalar"] = _gemma_scalar(fields, _GEMMA3_27B)


def _gemma_scalar(fields: Fields, layers: int) -> int:
    if fields["num_hidden_layers"] == layers:
        return int(fields["hidden_size"]) // int(fields["num_attention_heads"])
    return int(fields["head_dim"])


def _granite(settings: Settings, fields: Fields) -> None:
    width = fields["head_dim"]
    fields |= {
        "attention_multiplier": settings.number("attention.scale", 0.0) or width**-0.5,
        "embedding_multiplier": settings.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": settings.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": settings.number("logit_scale", 0.0) or 1.0,
    }


def _qwen_experts(settings: Settings, fields: Fields) -> None:
    shared = settings.count("expert_shared_feed_forward_length", 0)
    fields |= {
        "num_experts": settings.count("expert_count"),
        "num_experts_per_tok": settings.count("expert_used_count"),
        "moe_intermediate_size": settings.count("expert_feed_forward_length"),
        "norm_topk_prob": settings.flag("expert_weights_norm", fields["model_type"] == "qwen3_moe"),
    }
    if shared:
        fields["shared_expert_intermediate_size"] = shared


_FAMILIES: Final = {
    "llama": _Family("llama", _llama, interleaved=True),
    "qwen2": _Family("qwen2"),
    "qwen3": _Family("qwen3"),
    "qwen2moe": _Family("qwen2_moe", _qwen_experts, tensors=_QWEN_EXPERTS),
    "qwen3moe": _Family("qwen3_moe", _qwen_experts, tensors=_QWEN_EXPERTS),
    "phi3": _Family("phi3", _phi3, tensors={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
    "gemma": _Family("gemma", norms_plus_one=True),
    "gemma2": _Family("gemma2", _gemma2, norms_plus_one=True, tensors=_FOUR_NORMS),
    "gemma3": _Family("gemma3_text", _gemma3, norms_plus_one=True, tensors=_FOUR_NORMS),
    "granite": _Family("granite", _granite, interleaved=True),
    "smollm3": _Family("smollm3", interleaved=True),
    "olmo2": _Family("olmo2", tensors={k: v for k, v in _FOUR_NORMS.items() if k != "ffn_norm"}),
}
# Of these only a Hugging Face folder can be published.
_FOLDER_ONLY: Final = frozenset(
    ("arcee", "apertus", "cohere2", "command-r", "exaone4", "glm4", "mistral3", "nemotron", "olmo", "olmoe", "phi2")
) | {"granitemoe", "stablelm", "starcoder2", "seed_oss"}


def read_gguf_model(file: GgufFile) -> GgufModel:
    """Read the configuration and the names of a GGUF file.

    Raises:
      ModelError: an architecture, a setting or a tensor that is not known, or a damaged file.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelError(f"{file.path.name} lacks general.architecture in its metadata; the file is damaged.")
    family = _FAMILIES.get(architecture)
    if family is None:
        way = (
            "Give the Hugging Face folder of this model instead."
            if architecture in _FOLDER_ONLY
            else "The Hugging Face folder of such a model can't be published either, as far as is known."
        )
        known = ", ".join(sorted(_FAMILIES))
        raise ModelError(
            f"{file.path.name} has the GGUF architecture {architecture!r}. Files of {known} are read. {way}"
        )
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path.name} lacks the tensor token_embd.weight. The file is no whole model.")
    settings = Settings(file, architecture)
    config = _config(file, settings, family)
    settings.close()
    names = _Names(file, family, config)
    return GgufModel(_full(config), {name: weight for t in sorted(file.tensors) for name, weight in names.of(t)})


def _config(file: GgufFile, settings: Settings, family: _Family) -> Fields:
    heads, hidden = settings.count("attention.head_count"), settings.count("embedding_length")
    if not heads or not hidden:
        raise ModelError(f"{file.path.name} has heads or a width of zero; the file is damaged.")
    width = settings.count("attention.key_length", hidden // heads)
    if settings.count("attention.value_length", width) != width:
        raise ModelError(f"{file.path.name} has values of another width than keys, which is not supported.")
    metadata = file.metadata
    fields: Fields = {
        "model_type": family.kind,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": settings.count("feed_forward_length"),
        "num_hidden_layers": settings.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.count("attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": settings.count("context_length"),
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        # some configurations have a default beyond a small vocabulary
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id", metadata.get("tokenizer.ggml.eos_token_id")),
    }
    fields["rope_parameters"] = _rope(file, settings, fields, width)
    turned = settings.count("rope.dimension_count", width)
    if turned != width:
        if family.kind != "phi3":
            raise ModelError(
                f"{file.path.name} turns {turned} of the {width} values of a head, which is not supported for GGUF "
                "files of this architecture."
            )
        fields["rope_parameters"]["partial_rotary_factor"] = turned / width
    family.settings(settings, fields)
    if fields["model_type"] in ("llama", "mistral") and "blk.0.attn_q.bias" in file.tensors:
        fields["model_type"], fields["attention_bias"] = "llama", True
        if fields.get("sliding_window"):
            raise ModelError(f"{file.path.name} has a sliding window and biases, which is not supported.")
    return fields


def _rope(file: GgufFile, settings: Settings, fields: Fields, width: int) -> Fields:
    """How positions are scaled, as `rope_parameters`."""
    rope: Fields = {"rope_type": "default", "rope_theta": settings.number("rope.freq_base", 10000.0)}
    kind = settings.text("rope.scaling.type", "linear")  # as llama.cpp has it: a factor alone is linear
    factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 0.0)) or 1.0
    original = settings.count("rope.scaling.original_context_length", 0)
    attention = settings.number("rope.scaling.attn_factor", settings.number("rope.scaling.yarn_attn_factor", 1.0))
    context = fields["max_position_embeddings"]
    factors = {name: file.read(name).reshape(-1).tolist() for name in sorted(_FACTORS & file.tensors.keys())}
    if factors and (kind in ("none", "longrope") or (kind == "linear" and factor == 1)):
        plain = factors.get("rope_freqs.weight")
        short = plain or factors.get("rope_factors_short.weight")
        long = plain or factors.get("rope_factors_long.weight")
        if short is None or long is None or len(short) != len(long) or 2 * len(short) > width:
            raise ModelError(f"{file.path.name} has factors of positions that don't fit together; it is damaged.")
        if all(f == 1 for f in (*short, *long)) and attention == 1:
            return rope
        # each frequency divided by its factor: what transformers calls longrope, whoever made the factors
        return {
            **rope,
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "attention_factor": attention,
            "original_max_position_embeddings": original if original and not plain else context,
        }
    if factors:
        raise ModelError(f"{file.path.name} scales its positions in two ways at once, which is not supported.")
    if kind in ("none", "linear"):
        if attention != 1:
            raise ModelError(f"{file.path.name} scales its attention by {attention}, which is not supported.")
        return rope if kind == "none" or factor == 1 else {**rope, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        betas = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
        rope |= {name: settings.number(key) for name, key in betas.items() if settings.has(key)}
        if attention != 1:
            rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
        return {
            **rope,
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original or context,
        }
    raise ModelError(f"{file.path.name} scales its positions in the way {kind!r}, which is not supported.")


def _full(fields: Fields) -> Fields:
    """The configuration as transformers writes it into config.json."""
    import transformers

    kind = fields["model_type"]
    given = {k: v for k, v in fields.items() if k != "model_type"}
    try:
        config = transformers.AutoConfig.for_model(kind, **given).to_diff_dict()
    except Exception as error:  # those of the libraries share no public base
        raise ModelError(f"The settings of this GGUF file make no model of {kind!r}: {first_line(error)}.") from error
    left_out = ("transformers_version", "_name_or_path", "architectures")
    return {**{k: v for k, v in config.items() if v is not None and k not in left_out}, "model_type": kind}


class _Names:
    """Hugging Face names of the tensors of a file."""

    def __init__(self, file: GgufFile, family: _Family, config: Fields) -> None:
        self._file = file
        self._family = family
        self._config = config
        self._inner = {**_INNER, **(_MIXTRAL if config["model_type"] == "mixtral" else family.tensors)}

    def of(self, tensor: str) -> list[tuple[str, GgufWeight]]:
        """Names and weights that one tensor holds."""
        shape = self._file.tensors[tensor].shape
        if tensor in _FACTORS:
            return []  # in the configuration
        if tensor in _OUTER:
            return [(_OUTER[tensor], GgufWeight(tensor, shape, plus=self._plus(tensor)))]
        match = _BLOCK.fullmatch(tensor)
        inner = self._inner.get(match[2]) if match is not None else None
        if match is None or inner is None or (match[3] is not None) > ("{}" in inner):
            raise ModelError(
                f"{self._file.path.name} holds the tensor {tensor}, which is not known in files of this architecture."
            )
        start = f"model.layers.{match[1]}."
        if "{}" in inner and match[3] is None:  # all experts in one
            return [
                (f"{start}{inner.format(i)}.{match[4]}", GgufWeight(tensor, shape[1:], part=i))
                for i in range(shape[0])
            ]
        inner = inner.format(match[3])
        if inner.endswith("shared_expert_gate") and len(shape) == 1:
            shape = (1, *shape)
        found = [
            (
                f"{start}{inner}.{match[4]}",
                GgufWeight(tensor, shape, heads=self._heads(inner), plus=self._plus(tensor)),
            )
        ]
        if inner == "self_attn.q_proj" and match[4] == "bias" and self._config["model_type"] == "llama":
            output = f"blk.{match[1]}.attn_output.bias"
            if output not in self._file.tensors:  # transformers has it whenever there is one of q
                found.append((f"{start}self_attn.o_proj.bias", GgufWeight("", (self._config["hidden_size"],))))
        return found

    def _heads(self, inner: str) -> int:
        if not self._family.interleaved or inner not in ("self_attn.q_proj", "self_attn.k_proj"):
            return 0
        return int(self._config["num_attention_heads" if inner.endswith("q_proj") else "num_key_value_heads"])

    def _plus(self, tensor: str) -> float:
        return 1.0 if self._family.norms_plus_one and tensor.endswith("norm.weight") else 0.0
