"""Small random models, published like real ones: the graph of the publisher, weights out of a seed."""

from __future__ import annotations

import json
import tempfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from meshnode.engine.port import StageSpec
from protocols.manifest.messages import Architecture

VARIANTS = ("fp32", "int8", "int4")
CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Tiny:
    """One variant of a small model on disk."""

    folder: Path
    variant: str
    architecture: Architecture
    groups: dict[str, Path]

    def spec(self, first: int, last: int, *, threads: int = 1) -> StageSpec:
        wanted = [f"layer.{i}" for i in range(first, last)]
        wanted += ["embed"] if first == 0 else []
        wanted += ["head"] if last == self.architecture.layers else []
        return StageSpec(
            kind="onnx",
            graph=self.folder / f"graph-{self.variant}.onnx.zlib",
            groups={name: self.groups[name] for name in wanted},
            first=first,
            last=last,
            architecture=self.architecture,
            threads=threads,
            max_sessions=16,
            max_kv_bytes=1 << 30,
        )


@cache
def tiny_models() -> dict[str, Tiny]:
    """One model for the whole test run; its folder goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="meshnode-tiny-")
    _KEPT.append(folder)
    return make_tiny(Path(folder.name))


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def make_tiny(folder: Path, *, layers: int = 4, tied: bool = True) -> dict[str, Tiny]:
    """Publish every variant of a random Llama into `folder`. Takes about ten seconds, most of it imports."""
    from meshnode.publisher.graph import plan_graph
    from meshnode.publisher.original import empty_model, read_config, read_traits
    from meshnode.publisher.precision import PRECISIONS
    from meshnode.publisher.skeleton import build_skeleton

    architecture = Architecture(
        family="llama",
        layers=layers,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab=96,
        context=CONTEXT,
        bos_ids=(),
        eos_ids=(),
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": architecture.vocab,
        "hidden_size": architecture.hidden,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    original = read_config(folder)
    traits = read_traits(original)
    shapes = {name: tuple(value.shape) for name, value in empty_model(original).state_dict().items()}
    if tied:
        del shapes["lm_head.weight"]
    out = {}
    for variant in VARIANTS:
        skeleton = build_skeleton(folder, traits, shapes, CONTEXT)
        plan = plan_graph(
            skeleton.model, family="llama", layers=layers, precision=PRECISIONS[variant], rotary=skeleton.rotary
        )
        (folder / f"graph-{variant}.onnx.zlib").write_bytes(plan.graph)

        def read(name: str, shapes: dict[str, tuple[int, ...]] = shapes) -> np.ndarray[Any, Any]:
            return weight(name, shapes[name])

        groups = {}
        for name, group in plan.groups.items():
            groups[name] = folder / variant / f"{name}.safetensors"
            group.write(groups[name], lambda tensor, plan=plan, read=read: plan.read(tensor, read))  # type: ignore[misc]
        groups.setdefault("head", groups["embed"])
        out[variant] = Tiny(folder, variant, architecture, groups)
    return out


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Weights that belong to their name; norms near one, matrices that keep the size of what passes."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 1:
        return (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
    return (rng.standard_normal(shape) * shape[-1] ** -0.5 * 1.5).astype(np.float32)
