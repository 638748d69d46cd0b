"""The variant `train`: the checkpoint's weights as transformers has them, in bfloat16, one file per layer.

A trainer computes with torch, so its variant has no ONNX graph. In the place of the graph is a list of names:

    {"format": "meshnode-train/1", "groups": {"embed": ["model.embed_tokens.weight", ...], "layer.0": [...], ...}}

With a head of its own the model has a third kind of group, "head": the final norm and the head. Otherwise all that is
outside the layers is in "embed". The files are read back and compared with the checkpoint before they are published.

Runs in the publisher only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from meshnode.core.errors import ModelError
from meshnode.publisher.expression import Array
from meshnode.publisher.groups import Group, Stored, fresh
from meshnode.publisher.quality import Measured, deviation, perplexity_milli
from meshnode.publisher.reference import Reference
from protocols.manifest.messages import TRAIN

FORMAT: Final = "meshnode-train/1"
KERNEL_CLASS: Final = "torch-bf16/1"
MOST_DEVIATION: Final = 0.1  # of the logits, as in `precision.py`: rounding to bfloat16 makes 0.02
_INDEX: Final = "graph-train.json"


def write_training_variant(reference: Reference, out: Path, tick: Callable[[int, int], None]) -> dict[str, Any]:
    """Write the group files and the list of names; gives the variant's part of index.json.

    Args:
      tick: told how many groups of how many are done.

    Raises ModelError, DiskError.
    """
    own_head = reference.has_own_head
    where: dict[str, dict[str, Any]] = {}
    names: dict[str, list[str]] = {}

    def write(group: str, tensors: Mapping[str, Any]) -> None:
        path = out / TRAIN / f"{group}.safetensors"
        size = _write_group(group, tensors, path)
        names[group] = sorted(tensors)
        where[group] = {"path": str(path.relative_to(out)), "size": size}
        tick(len(where), reference.layers + (2 if own_head else 1))

    for index in range(reference.layers):
        write(f"layer.{index}", reference.layer_weights(index))
    ends = reference.outer_weights()
    if own_head:
        write("embed", {name: ends.pop(name) for name in reference.table_names})
    write("head" if own_head else "embed", ends)
    with fresh(out / _INDEX) as file:
        file.write((json.dumps({"format": FORMAT, "groups": names}, indent=1, sort_keys=True) + "\n").encode())
    return {
        "kernel_class": KERNEL_CLASS,
        "graph": {"path": _INDEX, "size": (out / _INDEX).stat().st_size},
        "embed": where["embed"],
        "layers": [where[f"layer.{index}"] for index in range(reference.layers)],
        "head": where["head" if own_head else "embed"],
    }


def _write_group(group: str, tensors: Mapping[str, Any], path: Path) -> int:
    import torch

    # its own kinds of numbers only where rounding would change what is meant
    kept = {n: t.to(torch.bfloat16) if t.is_floating_point() else t.to(torch.int64) for n, t in tensors.items()}
    plan = Group(group)
    for name in sorted(kept):
        kind = "BF16" if kept[name].is_floating_point() else "I64"
        plan.add(Stored(name, kind, tuple(kept[name].shape)))
    return plan.write(path, lambda name: _bits(kept[name]))


def _bits(tensor: Any) -> Array:
    """numpy has no bfloat16: its bits as unsigned numbers of 16 bits."""
    import torch

    plain = tensor.contiguous()
    return np.asarray((plain.view(torch.uint16) if plain.is_floating_point() else plain).numpy())


class TrainingFiles:
    """The tensors of a variant `train` on disk, as `Reference` reads them."""

    def __init__(self, folder: Path, variant: Mapping[str, Any]) -> None:
        """`variant`: its entry in index.json. Raises ModelError when a file can't be read."""
        from safetensors import SafetensorError, safe_open

        self._where: dict[str, Any] = {}
        listed = json.loads((folder / variant["graph"]["path"]).read_text(encoding="utf-8"))["groups"]
        paths = {"embed": variant["embed"]["path"], "head": variant["head"]["path"]}
        paths |= {f"layer.{k}": entry["path"] for k, entry in enumerate(variant["layers"])}
        for group, names in listed.items():
            try:
                file: Any = safe_open(str(folder / paths[group]), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{folder / paths[group]} can't be read back: {error}.") from error
            self._where.update(dict.fromkeys(names, file))

    def names(self) -> list[str]:
        return list(self._where)

    def raw(self, name: str) -> Any:
        return self._where[name].get_tensor(name)


def measure_training_variant(
    folder: Path, variant: Mapping[str, Any], config: Any, tokens: list[int], reference_logits: Array
) -> Measured:
    """What transformers makes of the files that were written. Raises ModelError when they make no model."""
    seen: list[Array] = []
    Reference(TrainingFiles(folder, variant), config).run([tokens], on_logits=seen.append)
    logits = seen[0]
    return Measured(perplexity_milli(logits, tokens), deviation(logits, reference_logits))
