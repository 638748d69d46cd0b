"""The publisher: a child process that turns a checkpoint into the files of a release.

    python -m meshnode.publisher.publish --source PATH|example:NAME --out DIR --variant int4 [--variant int8 ...]

It imports torch, transformers and mobius; nothing else in meshnode does. Progress and the result go to stdout as
JSON lines: {"step": ..., "variant": ..., "done": n, "total": n}, then {"finished": true}, or
{"error": "model" | "disk" | "config", "text": ...}. What it leaves in DIR:

    index.json                     everything that a manifest needs to know (see `release.py`)
    graph-int4.onnx.zlib           the weightless graph of a variant, compressed
    int4/layer.0.safetensors ...   its weight groups: one per layer, embed, and head unless it is tied to embed
    config.json tokenizer.json chat_template.jinja generation_config.json LICENSE quality.json

The same source gives the same bytes, so it gives the same CIDs (another build of zlib may pack the graph otherwise).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np

from meshnode.core.errors import ConfigError, DiskError, ModelError
from meshnode.publisher.calibrate import UNKNOWN, Importance, load_reference, measure_importance, measure_reference
from meshnode.publisher.checkpoint import Checkpoint, open_checkpoint
from meshnode.publisher.expression import Array
from meshnode.publisher.frequencies import rotary_frequencies
from meshnode.publisher.graph import Plan, build_skeleton, plan_graph
from meshnode.publisher.groups import disk_error, fresh, total_size
from meshnode.publisher.precision import Precision, precision
from meshnode.publisher.quality import TEXT_NAME, calibration_tokens, measure_graph, sample_tokens

MAX_CONTEXT: Final = 32768  # positions: longer rotary tables would cost every node memory
_CHAT_ENDS: Final = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>")

Progress = Callable[[str, str, int, int], None]  # step, variant, done, total


def publish(source: str, out: Path, variants: Iterable[str], progress: Progress) -> None:
    """Write the files of a release into `out` (created; files of an earlier run are replaced).

    Raises:
      ModelError: the source can't be read or its architecture can't be cut.
      DiskError: no room or no permission.
      ConfigError: an unknown variant.
    """
    wanted = [precision(v) for v in dict.fromkeys(variants)]
    progress("open", "", 0, 1)
    checkpoint = open_checkpoint(source)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "index.json").unlink(missing_ok=True)  # written last: its presence says that all is complete
        _publish(checkpoint, out, wanted, progress)
    except OSError as error:
        raise disk_error(out, error) from error


def _publish(checkpoint: Checkpoint, out: Path, wanted: list[Precision], progress: Progress) -> None:
    config = checkpoint.config
    family, layers = _text(config, "model_type"), _count(config, "num_hidden_layers")
    _write_json(out / "config.json", config)
    tokenizer, template, special = checkpoint.tokenizer()
    _write(out / "tokenizer.json", tokenizer.encode())
    files = ["config.json", "tokenizer.json"]
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
    architecture = _architecture(config, generation, tokenizer, template, special)
    frequencies = rotary_frequencies(out)
    plans: list[tuple[Precision, Plan, Any]] = []
    for kind in wanted:
        progress("graph", kind.name, len(plans), len(wanted))
        model, module = build_skeleton(out, layers)
        plan = plan_graph(
            model,
            family=family,
            layers=layers,
            context=architecture["context"],
            precision=kind,
            frequencies=frequencies,
        )
        plans.append((kind, plan, module))
    _check_room(out, sum(total_size(plan.groups.values()) + len(plan.graph) for _, plan, _ in plans))
    progress("reference", "", 0, 1)
    tokens = sample_tokens(out / "tokenizer.json", architecture["context"])
    importance, reference = _ask_reference(checkpoint, out, tokens, wanted, architecture["context"])
    described = {}
    for kind, plan, module in plans:
        described[kind.name] = _write_variant(checkpoint, out, kind, plan, module, importance, progress)
    quality = _measure(out, tokens, reference, described, progress)
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


def _write_variant(
    checkpoint: Checkpoint,
    out: Path,
    kind: Precision,
    plan: Plan,
    module: Any,
    importance: Importance,
    progress: Progress,
) -> dict[str, Any]:
    """Write the graph and the group files of one variant; gives its part of index.json."""
    graph = out / f"graph-{kind.name}.onnx.zlib"
    _write(graph, plan.graph)
    where: dict[str, dict[str, object]] = {}
    for done, (name, group) in enumerate(plan.groups.items()):
        progress("weights", kind.name, done, len(plan.groups))
        layer = int(name.removeprefix("layer.")) if name.startswith("layer.") else None
        weights = _Weights(checkpoint, module, layer)
        path = out / kind.name / f"{name}.safetensors"
        size = group.write(path, partial(plan.read, weights=weights, importance=importance))
        where[name] = {"path": str(path.relative_to(out)), "size": size}
    progress("weights", kind.name, len(plan.groups), len(plan.groups))
    return {
        "kernel_class": kind.kernel_class,
        "graph": {"path": graph.name, "size": graph.stat().st_size},
        "embed": where["embed"],
        "layers": [where[f"layer.{k}"] for k in range(len(where) - (1 if plan.tied else 2))],
        "head": where["embed" if plan.tied else "head"],
    }


class _Weights:
    """Weights of one group under the names of the architecture, loaded when first asked for."""

    def __init__(self, checkpoint: Checkpoint, module: Any, layer: int | None) -> None:
        self._checkpoint = checkpoint
        self._module = module
        self._layer = layer
        self._known: dict[str, Any] | None = None

    def __call__(self, name: str) -> Array:
        import torch

        if self._known is None:
            names = self._checkpoint.part(self._layer)
            # the architecture's renaming wants to see the outer weights too, but not what is in them
            state = dict.fromkeys(self._checkpoint.part(None), torch.empty(0))
            state |= {n: torch.from_numpy(np.array(self._checkpoint.tensor(n))) for n in names}
            self._known = self._module.preprocess_weights(state)
        if name not in self._known:
            raise ModelError(f"The checkpoint lacks the weight {name}. Is it complete, and is config.json its own?")
        return np.asarray(self._known[name].numpy())


def _ask_reference(
    checkpoint: Checkpoint, out: Path, tokens: list[int], wanted: list[Precision], context: int
) -> tuple[Importance, int]:
    """Importance of the weights (for 4 bits) and the perplexity of the checkpoint; nothing and 0 without memory."""
    model = load_reference(checkpoint)
    if model is None:
        return UNKNOWN, 0
    importance = UNKNOWN
    if any(kind.packing is not None and kind.packing.bits < 8 for kind in wanted):
        importance = measure_importance(model, calibration_tokens(out / "tokenizer.json", context))
    return importance, measure_reference(model, tokens)


def _measure(
    out: Path, tokens: list[int], reference: int, described: dict[str, dict[str, Any]], progress: Progress
) -> dict[str, Any]:
    """Perplexities for quality.json; adds each variant's own to its part of index.json."""
    common: dict[str, Any] = {"text": TEXT_NAME, "tokens": len(tokens), "reference_milli": reference}
    found = {}
    for name, variant in described.items():
        progress("quality", name, 0, 1)
        found[name] = measure_graph(out, variant, tokens)
        variant["quality"] = {**common, "perplexity_milli": found[name]}
    return {**common, "variants": found}


def _architecture(
    config: dict[str, Any], generation: dict[str, Any], tokenizer: str, template: str | None, special: dict[str, Any]
) -> dict[str, Any]:
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    return {
        "family": _text(config, "model_type"),
        "layers": _count(config, "num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "vocab": _count(config, "vocab_size"),
        "context": min(_positions(config), MAX_CONTEXT),
        "bos_ids": _ids(config.get("bos_token_id")),
        "eos_ids": _end_ids(config, generation, tokenizer, template, special),
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


def _end_ids(
    config: dict[str, Any], generation: dict[str, Any], tokenizer: str, template: str | None, special: dict[str, Any]
) -> list[int]:
    """Tokens that end an answer: those of the configurations, of the tokenizer, and the chat template's own."""
    found = set(_ids(config.get("eos_token_id"))) | set(_ids(generation.get("eos_token_id")))
    try:
        added = {t["content"]: t["id"] for t in json.loads(tokenizer).get("added_tokens", [])}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"tokenizer.json of the model can't be read: {error}.") from error
    named = special.get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    ends = [named] if isinstance(named, str) else []
    ends += [t for t in _CHAT_ENDS if template is not None and t in template]
    found |= {added[t] for t in ends if t in added}
    vocab = _count(config, "vocab_size")
    return sorted(i for i in found if i < vocab)


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
