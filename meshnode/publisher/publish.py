"""The publisher: a child process that turns a checkpoint into the files of a release.

    python -m meshnode.publisher.publish --source PATH|example:NAME --out DIR --variant int4 [--variant int8 ...]

It imports torch, transformers and mobius; nothing else in meshnode does. Progress and the result go to stdout as
JSON lines: {"step": ..., "variant": ..., "done": n, "total": n}, then {"finished": true}, or
{"error": "model" | "disk" | "config", "text": ...}. What it leaves in DIR:

    index.json                     everything that a manifest needs to know (see `release.py`)
    graph-int4.onnx.zlib           the weightless graph of a variant, compressed; of `train` a list (`training.py`)
    int4/layer.0.safetensors ...   its weight groups: one per layer, embed, and head unless it is tied to embed
    config.json tokenizer.json special_tokens_map.json chat_template.jinja generation_config.json LICENSE quality.json

The same source gives the same bytes, so it gives the same CIDs (another build of zlib may pack the graph otherwise).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TextIO

import numpy as np

from meshnode.core.errors import ConfigError, DiskError, ModelError
from meshnode.engine.cut import View
from meshnode.publisher.calibrate import Importance
from meshnode.publisher.checkpoint import Checkpoint, open_checkpoint
from meshnode.publisher.expression import Array
from meshnode.publisher.gate import Passed, examine
from meshnode.publisher.graph import Plan, kept_heads, plan_graph
from meshnode.publisher.groups import disk_error, fresh, total_size
from meshnode.publisher.model_text import check_text
from meshnode.publisher.original import Traits, read_config, read_traits
from meshnode.publisher.precision import Precision, precision
from meshnode.publisher.quality import TEXT_NAME, calibration_tokens, measure_variant, sample_tokens, text_length
from meshnode.publisher.reference import Reference
from meshnode.publisher.skeleton import Skeleton, build_skeleton
from meshnode.publisher.special_tokens import end_ids
from meshnode.publisher.stages import Stages
from meshnode.publisher.training import MOST_DEVIATION, measure_training_variant, write_training_variant
from protocols.manifest.messages import TRAIN

MAX_CONTEXT: Final = 32768  # positions: longer rotary tables would cost every node memory
_TIES_DEVIATION: Final = 0.1  # of logits, where single tokens choose other experts
_FEWEST_IDS: Final = 16  # different ones that a text must have to show anything

Progress = Callable[[str, str, int, int], None]  # step, variant, done, total


def publish(source: str, out: Path, variants: Iterable[str], progress: Progress) -> None:
    """Write the files of a release into `out` (created; files of an earlier run are replaced).

    Raises:
      ModelError: the source can't be read or its architecture can't be cut.
      DiskError: no room or no permission.
      ConfigError: an unknown variant.
    """
    names = list(dict.fromkeys(variants))
    wanted = [precision(name) for name in names if name != TRAIN]
    progress("open", "", 0, 1)
    checkpoint = open_checkpoint(source)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "index.json").unlink(missing_ok=True)  # written last: its presence says that all is complete
        _publish(checkpoint, out, wanted, TRAIN in names, progress)
    except OSError as error:
        raise disk_error(out, error) from error


def _publish(checkpoint: Checkpoint, out: Path, wanted: list[Precision], training: bool, progress: Progress) -> None:
    config = checkpoint.config
    _write_json(out / "config.json", config)
    tokenizer, template, special = checkpoint.tokenizer()
    _write(out / "tokenizer.json", tokenizer.encode())
    _write_json(out / "special_tokens_map.json", special)
    files = ["config.json", "tokenizer.json", "special_tokens_map.json"]
    if template is not None:
        _write(out / "chat_template.jinja", template.encode())
        files.append("chat_template.jinja")
    generation = checkpoint.generation_config()
    if generation:
        _write_json(out / "generation_config.json", generation)
        files.append("generation_config.json")
    licence = checkpoint.licence()
    if licence is not None:
        _write(out / "LICENSE", licence)
        files.append("LICENSE")
    original = read_config(out)
    family, layers = str(original.model_type), _count(config, "num_hidden_layers")
    traits = read_traits(original)
    check_text(out, checkpoint.suggested_name, files, _count(config, "vocab_size"))
    context = min(_positions(config), MAX_CONTEXT)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
    plans: dict[str, _Planned] = {}
    for kind in dict.fromkeys((precision("fp32"), *wanted)):  # fp32 is what the gate looks at
        progress("graph", kind.name, len(plans), len(wanted))
        skeleton = build_skeleton(out, traits, shapes, context)
        kept = kept_heads(skeleton.model)
        plan = plan_graph(skeleton.model, family=family, layers=layers, precision=kind, rotary=skeleton.rotary)
        plans[kind.name] = _Planned(kind, plan, skeleton)
    architecture = _architecture(config, generation, tokenizer, template, special)
    architecture |= {"context": context, "kv_heads": kept[0], "head_dim": kept[1]}
    weights = sum(prod(s) for s in shapes.values())
    needed = sum(total_size(p.plan.groups.values()) + len(p.plan.graph) for p in plans.values())
    _check_room(out, needed + (2 * weights if training else 0))
    length = text_length(weights, architecture["vocab"], context)
    tokens = _text_or_noise(sample_tokens(out / "tokenizer.json", length), architecture["vocab"], length)
    passed = _gate(checkpoint, out, traits, plans["fp32"], tokens, wanted, context, progress)
    described = {}
    for kind in wanted:
        described[kind.name] = _write_variant(checkpoint, out, plans[kind.name], passed.importance, progress)
    if training:
        progress("weights", TRAIN, 0, layers)
        reference = Reference(checkpoint, traits.config)
        described[TRAIN] = write_training_variant(reference, out, partial(progress, "weights", TRAIN))
    quality = _measure(out, tokens, passed, described, traits, progress)
    _write_json(out / "quality.json", quality)
    files.append("quality.json")
    _write_json(
        out / "index.json",
        {
            "name": checkpoint.suggested_name,
            "architecture": architecture,
            "files": {name: {"path": name, "size": (out / name).stat().st_size} for name in sorted(files)},
            "variants": described,
        },
    )


@dataclass(frozen=True, slots=True)
class _Planned:
    precision: Precision
    plan: Plan
    skeleton: Skeleton

    @property
    def graph(self) -> str:
        """Name of the graph's file."""
        return f"graph-{self.precision.name}.onnx.zlib"


def _text_or_noise(tokens: list[int], vocabulary: int, length: int) -> list[int]:
    """The fixed text; ids by chance where the tokenizer makes next to nothing of it, or ids that the model lacks."""
    known = [t for t in tokens if t < vocabulary]
    if len(set(known)) >= _FEWEST_IDS:
        return known
    return [int(t) for t in np.random.default_rng(0).integers(0, vocabulary, length)]


def _gate(
    checkpoint: Checkpoint,
    out: Path,
    traits: Traits,
    planned: _Planned,
    tokens: list[int],
    wanted: list[Precision],
    context: int,
    progress: Progress,
) -> Passed:
    """Compare the float32 graph with transformers. Raises ModelError when it says something else."""
    layers = len(traits.layers)
    progress("reference", "", 0, layers)
    vocabulary, calibration = traits.config.get_text_config().vocab_size, []
    if any(kind.packing is not None and kind.packing.bits < 8 for kind in wanted):
        sample = calibration_tokens(out / "tokenizer.json", len(tokens))
        calibration = _text_or_noise(sample, vocabulary, len(tokens))
    weights = _PlannedWeights(checkpoint, planned)
    with TemporaryDirectory(prefix="gate-", dir=out) as folder:
        graph = Path(folder) / planned.graph
        _write(graph, planned.plan.graph)
        return examine(
            Reference(checkpoint, traits.config),
            Stages(graph, layers, weights, once=True),
            traits,
            tokens,
            calibration,
            context,
            lambda done: progress("reference", "", done, layers),
        )


class _PlannedWeights:
    """The float32 weights of a stage, out of the checkpoint: no file of them is written for the gate."""

    def __init__(self, checkpoint: Checkpoint, planned: _Planned) -> None:
        self._checkpoint = checkpoint
        self._planned = planned

    def __call__(self, views: dict[str, View]) -> dict[str, Array]:
        plan, skeleton = self._planned.plan, self._planned.skeleton
        groups = {v.group: _Weights(self._checkpoint, skeleton, _layer(v.group)) for v in views.values()}
        return {n: plan.read(n.rpartition(":")[2], groups[v.group]) for n, v in views.items()}


def _write_variant(
    checkpoint: Checkpoint, out: Path, planned: _Planned, importance: Importance, progress: Progress
) -> dict[str, Any]:
    """Write the graph and the group files of one variant; gives its part of index.json."""
    kind, plan = planned.precision, planned.plan
    matters = importance.of_wide_heads(planned.skeleton.wide)
    graph = out / planned.graph
    _write(graph, plan.graph)
    where: dict[str, dict[str, object]] = {}
    for done, (name, group) in enumerate(plan.groups.items()):
        progress("weights", kind.name, done, len(plan.groups))
        weights = _Weights(checkpoint, planned.skeleton, _layer(name))
        path = out / kind.name / f"{name}.safetensors"
        size = group.write(path, partial(plan.read, weights=weights, importance=matters))
        plan.forget()
        where[name] = {"path": str(path.relative_to(out)), "size": size}
    progress("weights", kind.name, len(plan.groups), len(plan.groups))
    return {
        "kernel_class": kind.kernel_class,
        "graph": {"path": graph.name, "size": graph.stat().st_size},
        "embed": where["embed"],
        "layers": [where[f"layer.{k}"] for k in range(len(where) - (1 if plan.tied else 2))],
        "head": where["embed" if plan.tied else "head"],
    }


def _layer(group: str) -> int | None:
    """The layer of a group of weights; None: the ends."""
    return int(group.removeprefix("layer.")) if group.startswith("layer.") else None


class _Weights:
    """Weights of one group under the names of the architecture.

    A layer is read whole when the first of its weights is asked for; of the ends, which are large, only what is asked
    for.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton, layer: int | None) -> None:
        self._checkpoint = checkpoint
        self._rename = skeleton.rename
        self._layer = layer
        self._known: dict[str, Any] | None = None

    def __call__(self, name: str) -> Array:
        import torch

        if self._known is None:
            # the architecture's renaming wants to see the outer weights too, but not what is in them
            state = {n: torch.empty(self._checkpoint.shape(n), device="meta") for n in self._checkpoint.part(None)}
            if self._layer is not None:
                state |= {n: self._read(n) for n in self._checkpoint.part(self._layer)}
            sources = {id(value): n for n, value in state.items()}
            self._known = self._rename(state)
            self._sources = {n: sources[id(value)] for n, value in self._known.items() if id(value) in sources}
            self._held = state  # so that no id is used again
        value = self._known.get(name)
        if value is None:
            raise ModelError(
                f"The checkpoint lacks the weight {name}, which the graph builder wants for this architecture."
            )
        if value.is_meta:
            if name not in self._sources:
                raise ModelError(f"The weight {name} is made of others in a way that is not supported.")
            value = self._read(self._sources[name])
        return np.asarray(value.numpy())

    def _read(self, name: str) -> Any:
        import torch

        return self._checkpoint.raw(name).to(torch.float32)


def _measure(
    out: Path,
    tokens: list[int],
    passed: Passed,
    described: dict[str, dict[str, Any]],
    traits: Traits,
    progress: Progress,
) -> dict[str, Any]:
    """Perplexities for quality.json; adds each variant's own to its part of index.json."""
    common: dict[str, Any] = {"text": TEXT_NAME, "tokens": len(tokens), "reference_milli": passed.reference_milli}
    found = {}
    for name, variant in described.items():
        progress("quality", name, 0, 1)
        if name == TRAIN:
            measured = measure_training_variant(out, variant, traits.config, tokens, passed.logits)
            most = MOST_DEVIATION
        else:
            measured = measure_variant(out, variant, tokens, passed.logits)
            most = precision(name).most_deviation
        most = max(most, _TIES_DEVIATION if traits.experts else 0)
        if not measured.deviation <= most:
            raise ModelError(
                f"This model is not published in {name}: the logits of that variant deviate from transformers by "
                f"{measured.deviation:.2g} of their standard deviation; at most {most:g} is let through, and float32 "
                "deviates by less than 0.001. Choose another variant."
            )
        found[name] = {"perplexity_milli": measured.perplexity_milli, "logit_deviation": measured.deviation}
        variant["quality"] = {**common, "perplexity_milli": measured.perplexity_milli}
    gate = {
        "largest_logit_difference": passed.difference,
        "standard_deviation": passed.spread,
        "tokens": len(tokens),
        "same_most_likely_token": passed.agreed,
    }
    return {**common, "variants": found, "float32_beside_transformers": gate}


def _architecture(
    config: dict[str, Any], generation: dict[str, Any], tokenizer: str, template: str | None, special: dict[str, str]
) -> dict[str, Any]:
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    vocab = _count(config, "vocab_size")
    ends = [config.get("eos_token_id"), generation.get("eos_token_id")]
    return {
        "family": _text(config, "model_type"),
        "layers": _count(config, "num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "vocab": vocab,
        "bos_ids": _ids(config.get("bos_token_id")),
        "eos_ids": end_ids(ends, special, tokenizer, template, vocab),
    }


def _positions(config: dict[str, Any]) -> int:
    """How many positions have one angle each, whatever the length of the text.

    Models with `longrope` turn all positions otherwise as soon as a text is longer than their original context.
    """
    key = "max_position_embeddings"
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in ("longrope", "su"):
        return _count(config, key)
    original = f"original_{key}"
    return min(_count(config, key), _count({**config, **rope}, original))


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def _count(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        family = config.get("model_type")
        raise ModelError(
            f"config.json has no usable {key}: models of the architecture {family!r} are not plain decoder models."
        )
    return value


def _text(config: dict[str, Any], key: str) -> str:
    value = config.get(key)
    if not isinstance(value, str):
        raise ModelError(f"config.json has no usable {key}.")
    return value


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DiskError(
            f"The model needs {needed / 1e6:.0f} MB in {out}, but only {free / 1e6:.0f} MB are free there."
        )


def _write(path: Path, content: bytes) -> None:
    with fresh(path) as file:
        file.write(content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the child process."""
    parser = argparse.ArgumentParser(prog="python -m meshnode.publisher.publish")
    parser.add_argument("--source", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--variant", action="append", required=True)
    options = parser.parse_args(arguments)
    # Libraries print to stdout as they like; the real one is kept for our lines alone.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        publish(options.source, options.out, options.variant, _reporter(lines))
    except (ModelError, DiskError, ConfigError) as error:
        kind = {ModelError: "model", DiskError: "disk", ConfigError: "config"}[type(error)]
        lines.write(json.dumps({"error": kind, "text": str(error)}) + "\n")
        return error.exit_code
    except ImportError as error:
        text = f"Adding a model needs the package {error.name}. Install it: pip install 'meshnode[publish]'"
        lines.write(json.dumps({"error": "model", "text": text}) + "\n")
        return ModelError.exit_code
    lines.write(json.dumps({"finished": True}) + "\n")
    return 0


def _reporter(lines: TextIO) -> Progress:
    def report(step: str, variant: str, done: int, total: int) -> None:
        lines.write(json.dumps({"step": step, "variant": variant, "done": done, "total": total}) + "\n")

    return report


if __name__ == "__main__":
    sys.exit(main())
