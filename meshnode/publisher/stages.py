"""The stages of a graph, one at a time and in this process: what the gate and the quality figures run.

They are cut as an engine cuts them (`engine/cut.py`), one layer or the head each, and get their weights from whoever
opens them, so that a model needs the memory of one layer.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from meshnode.core.errors import ModelError
from meshnode.engine.cut import Cut, View, WeightlessGraph
from meshnode.engine.graph_file import open_graph
from meshnode.publisher.expression import Array
from meshnode.publisher.words import first_line

Weights = Callable[[dict[str, View]], dict[str, Array]]  # initializers and where their bytes are -> the tensors
_CHUNK: Final = 256  # tokens of one run, as an engine takes prompts


class Stages:
    """All stages of one graph."""

    def __init__(self, graph: Path, layers: int, weights: Weights, *, once: bool = False) -> None:
        """`once`: each stage runs once, so its weights are not repacked.

        Raises ModelError when the file is no graph.
        """
        self._graph = WeightlessGraph(open_graph(graph))
        self._layers = layers
        self._weights = weights
        self._once = once
        self._tables: dict[str, Array] = {}

    def run(self, tokens: list[int]) -> Array:
        """Run a text through all of them: logits float32 [tokens, vocabulary]."""
        x: Array = np.array(tokens, np.int64)
        for index in range(self._layers):
            x = self.layer(index, x)
        return self.head(x)

    def layer(self, index: int, x: Array) -> Array:
        """One layer over token ids [tokens] (the first layer) or hidden states [tokens, hidden]."""
        return self._run(self._graph.layers(index, index + 1), x)

    def head(self, x: Array) -> Array:
        """Logits [tokens, vocabulary] of the last layer's output."""
        return self._run(self._graph.head(self._layers), x)

    def _run(self, cut: Cut, x: Array) -> Array:
        try:
            return self._ran(cut, x)
        except (ModelError, OSError, MemoryError):
            raise
        except Exception as error:  # those of onnxruntime share no public base
            raise ModelError(
                f"ONNX Runtime can't run the graph of this model ({cut.outputs[0]}): {first_line(error)[-300:]}."
            ) from error

    def _ran(self, cut: Cut, x: Array) -> Array:
        from meshnode.engine.runtime import ort

        arrays = {name: array.reshape(cut.views[name].shape) for name, array in self._weights(cut.views).items()}
        for name, table in cut.tables.items():
            if name not in self._tables:
                self._tables[name] = table()
            arrays[name] = self._tables[name]
        # the session looks into these arrays as long as it lives
        values = {n: ort.OrtValue.ortvalue_from_numpy(_contiguous(arrays.pop(n))) for n in list(arrays)}
        session = self._open(cut, values)
        binding = session.io_binding()
        known = {entry.name: entry for entry in session.get_inputs()}
        for name in values.keys() & known.keys():
            binding.bind_ortvalue_input(name, values[name])
        for name in cut.inputs[1:]:
            if name.startswith("past_key_values."):
                _, heads, _, width = known[name].shape
                buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, len(x), width), np.float32))
                binding.bind_ortvalue_input(name, buffer)
                binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), buffer)
        parts = []
        for start in range(0, len(x), _CHUNK):
            rows = np.ascontiguousarray(x[None, start : start + _CHUNK])
            end = start + rows.shape[1]
            binding.bind_cpu_input(cut.inputs[0], rows)
            if "attention_mask" in known:
                binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
            if "position_ids" in known:
                binding.bind_cpu_input("position_ids", np.arange(start, end, dtype=np.int64)[None])
            binding.bind_output(cut.outputs[0])
            session.run_with_iobinding(binding)
            parts.append(np.array(binding.get_outputs()[-1].numpy()[0]))  # it was bound last
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _open(self, cut: Cut, values: dict[str, Any]) -> Any:
        from meshnode.engine.runtime import ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = cut.model
        if self._once:
            model = _weights_as_inputs(model, values)
        else:
            options.add_external_initializers(list(values), list(values.values()))
            for name, value in values.items():
                options.add_initializer(name, value)  # used where they are, and not copied (engine/onnx_stage.py)
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _weights_as_inputs(model: bytes, values: dict[str, Any]) -> bytes:
    """The same graph, which is given its weights when it runs.

    A session copies and repacks its weights when it is opened, which takes time and twice the memory.
    """
    proto = onnx.load_from_string(model)
    kept = []
    for tensor in proto.graph.initializer:
        if tensor.name in values:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
        else:
            kept.append(tensor)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return bytes(proto.SerializeToString())


def _contiguous(array: Array) -> Array:
    if array.flags.c_contiguous:
        return array
    import torch

    return np.asarray(torch.from_numpy(array).contiguous().numpy())  # on all cores, which numpy doesn't


class GroupFiles:
    """Weights out of published group files; a file is mapped as long as its stage runs."""

    def __init__(self, folder: Path, variant: dict[str, Any]) -> None:
        """`variant`: its entry in index.json."""
        self._paths = {"embed": folder / variant["embed"]["path"], "head": folder / variant["head"]["path"]}
        self._paths |= {f"layer.{k}": folder / entry["path"] for k, entry in enumerate(variant["layers"])}

    def __call__(self, views: dict[str, View]) -> dict[str, Array]:
        maps: dict[str, Array] = {}
        for group in {view.group for view in views.values()}:
            with self._paths[group].open("rb") as file:
                maps[group] = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        return {n: maps[v.group][v.offset : v.offset + v.length].view(v.dtype) for n, v in views.items()}
