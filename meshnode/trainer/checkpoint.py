"""What a job has reached, on disk after every step: a process that is killed loses the step it was at, no more.

A safetensors file with the vector and its moments; the rest is JSON in its metadata. It is written beside the old one
and then takes its place. Runs in the trainer only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from meshnode.core.errors import BadRequest, DiskError


@dataclass(slots=True)
class Checkpoint:
    """
    Attributes:
      tensors: flat float32 vectors by name.
      facts: JSON: what belongs to them.
    """

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the file, at once and for good. Raises DiskError."""
    replace_file(path, save(checkpoint.tensors, {"facts": json.dumps(checkpoint.facts)}))


def read_checkpoint(path: Path) -> Checkpoint | None:
    """None when there is none, or none that was written to its end."""
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return Checkpoint({name: file.get_tensor(name).clone() for name in file.keys()}, facts)  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError):
        return None


def read_optimiser(path: Path, parameters: int) -> Checkpoint:
    """Moments that another job left. Raises BadRequest for a file that holds none of this size."""
    found = read_checkpoint(path)
    right = found is not None and all(_fits(found.tensors.get(name), parameters) for name in ("first", "second"))
    if found is None or not right or not isinstance(found.facts.get("moved"), Mapping):
        raise BadRequest(f"{path} holds no moments of {parameters} parameters.")
    return found


def _fits(tensor: torch.Tensor | None, parameters: int) -> bool:
    return tensor is not None and tensor.shape == (parameters,) and tensor.dtype == torch.float32


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all. Raises DiskError."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise DiskError(
            f"{path} can't be written: {error.strerror or error}. What was trained is in danger."
        ) from error
