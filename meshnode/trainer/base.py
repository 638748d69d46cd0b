"""The model that is adapted: transformers' own, with the weights of the variant `train`. Runs in the trainer only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from meshnode.core.errors import ModelError
from meshnode.publisher.original import empty_model
from meshnode.publisher.words import first_line
from meshnode.trainer.port import ModelFiles

INDEX_FORMAT: Final = "meshnode-train/1"
_INDEX_BYTES: Final = 16 << 20


def load_base(files: ModelFiles, compute: str) -> Any:
    """The causal language model; its weights have the type `compute` and are not trained.

    Raises ModelError when the files can't be read, or are not what the configuration describes.
    """
    model = empty_model(_config(files.config))
    kind = {"bfloat16": torch.bfloat16, "float32": torch.float32}[compute]
    expected = model.state_dict()
    state: dict[str, torch.Tensor] = {}
    for group, names in _index(files.index).items():
        if group not in files.groups:
            raise ModelError(f"The variant train of {files.name} lacks its file {group}.")
        state |= _read(files.groups[group], names, kind)
    for name, value in state.items():
        if name not in expected or expected[name].shape != value.shape:
            raise ModelError(
                f"The weight {name[:120]} of {files.name}, in its variant train, is not one that the model in its "
                "config.json has. Publish the model again."
            )
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = sorted(n for n, p in model.named_parameters() if p.is_meta)
    if missing:
        raise ModelError(f"The variant train of {files.name} lacks the weight {missing[0]} ({len(missing)} in all).")
    model.requires_grad_(False)
    if model._supports_sdpa:  # elsewhere scores are changed in a way that the quick one can't do
        model.set_attn_implementation("sdpa")
    return model.eval()


def _config(path: Path) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"The configuration of the model can't be read: {first_line(error)}.") from error


def _index(path: Path) -> Mapping[str, list[str]]:
    try:
        if path.stat().st_size > _INDEX_BYTES:
            raise ValueError(f"it has more than {_INDEX_BYTES} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
        groups = raw["groups"]
        right = raw["format"] == INDEX_FORMAT and all(
            isinstance(names, list) and all(isinstance(name, str) for name in names) for names in groups.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"The list of weights of the variant train can't be read: {first_line(error)}.") from error
    if not right:
        raise ModelError(f"The list of weights of the variant train is none of the format {INDEX_FORMAT}.")
    return dict(groups)


def _read(path: Path, names: list[str], kind: torch.dtype) -> dict[str, torch.Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"A file of the variant train can't be read: {first_line(error)}.") from error
    return {name: value.to(kind) if value.is_floating_point() else value for name, value in tensors.items()}
