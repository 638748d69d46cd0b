"""How good a variant is: perplexity on a fixed text, beside the float32 checkpoint in transformers.

The text is the introduction of Charles Darwin's "On the Origin of Species" (1859, public domain). Its perplexity
says nothing about how clever a model is; the distance between a variant and the reference says what the variant
has lost.
"""

from __future__ import annotations

import mmap
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from meshnode.core.errors import ModelError
from meshnode.engine.graph_file import read_graph
from meshnode.engine.rotary import is_placeholder, parse
from meshnode.publisher.expression import Array

TEXT_NAME: Final = "origin-of-species-1859-introduction"
MOST_TOKENS: Final = 768
_QUALITY_FILE: Final = "quality_text.txt"
_CALIBRATION_FILE: Final = "calibration_text.txt"  # our own; must share nothing with the text that is measured
_TYPES: Final[dict[int, np.dtype[Any]]] = {
    onnx.TensorProto.FLOAT: np.dtype("<f4"),
    onnx.TensorProto.UINT8: np.dtype("u1"),
}


def sample_tokens(tokenizer: Path, context: int) -> list[int]:
    """Token ids of the fixed text, at most `MOST_TOKENS` and the model's context."""
    return _tokens(_QUALITY_FILE, tokenizer, context)


def calibration_tokens(tokenizer: Path, context: int) -> list[int]:
    """Token ids of the mixed text that shows which inputs matter."""
    return _tokens(_CALIBRATION_FILE, tokenizer, context)


def _tokens(name: str, tokenizer: Path, context: int) -> list[int]:
    import tokenizers

    text = files("meshnode.publisher").joinpath(name).read_text(encoding="utf-8")
    try:
        loaded = tokenizers.Tokenizer.from_file(str(tokenizer))
    except Exception as error:
        raise ModelError(f"tokenizer.json of the model can't be read: {error}.") from error
    return list(loaded.encode(text).ids[: min(MOST_TOKENS, context)])


def perplexity_milli(logits: Array, tokens: list[int]) -> int:
    """exp(mean negative log likelihood of the next token) * 1000. `logits` is [rows, vocabulary]."""
    rows = np.asarray(logits[:-1], np.float64)
    peak = rows.max(axis=1)
    norm = peak + np.log(np.exp(rows - peak[:, None]).sum(axis=1))
    likelihood = rows[np.arange(len(rows)), tokens[1:]] - norm
    return round(float(np.exp(-likelihood.mean())) * 1000)


def open_uncut(folder: Path, variant: dict[str, Any], *, threads: int = 0, level: str = "all") -> Any:
    """An onnxruntime session over the whole graph of one variant of `index.json`.

    Args:
      folder: where index.json lies.
      variant: its entry under "variants".
      threads: intra-op threads, 0 for all cores.
      level: graph optimisation of onnxruntime: "basic", "extended" or "all".
    """
    import onnxruntime

    where = {"embed": variant["embed"], "head": variant["head"]}
    where |= {f"layer.{k}": entry for k, entry in enumerate(variant["layers"])}
    maps = {name: _mapped(folder / entry["path"]) for name, entry in where.items()}
    model = read_graph(folder / variant["graph"]["path"])
    names, values = [], []
    for tensor in model.graph.initializer:
        if is_placeholder(tensor):
            names.append(tensor.name)
            values.append(onnxruntime.OrtValue.ortvalue_from_numpy(parse(tensor).table()))
        elif tensor.data_location == onnx.TensorProto.EXTERNAL:
            external = {e.key: e.value for e in tensor.external_data}
            kind = _TYPES[tensor.data_type]
            raw = maps[external["location"]][int(external["offset"]) :][: int(external["length"])]
            names.append(tensor.name)
            values.append(
                onnxruntime.OrtValue.ortvalue_from_numpy(raw.view(np.dtype(kind)).reshape(tuple(tensor.dims)))
            )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.graph_optimization_level = {
        "disable": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }[level]
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_external_initializers(names, values)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _mapped(path: Path) -> Array:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def uncut_logits(session: Any, tokens: list[int]) -> Array:
    """Run a whole prompt from the start: logits [rows, vocabulary]."""
    rows = len(tokens)
    feeds: dict[str, Array] = {}
    for entry in session.get_inputs():
        if entry.name == "input_ids":
            feeds[entry.name] = np.array([tokens], np.int64)
        elif entry.name == "attention_mask":
            feeds[entry.name] = np.ones((1, rows), np.int64)
        elif entry.name == "position_ids":
            feeds[entry.name] = np.arange(rows, dtype=np.int64)[None]
        else:
            feeds[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
    return np.asarray(session.run(["logits"], feeds)[0][0])


def measure_graph(folder: Path, variant: dict[str, Any], tokens: list[int]) -> int:
    """Perplexity (in thousandths) of one variant on the uncut graph."""
    return perplexity_milli(uncut_logits(open_uncut(folder, variant), tokens), tokens)
