"""A span of layers in ONNX Runtime, cut from the weightless graph over memory-mapped weights.

The span is a chain of segments; every segment is an onnxruntime session over a run of layers, the head is one
of its own, because a prompt needs the logits of its last row alone. A session that wants a part of a segment
splits it. Keys and values live in one buffer per layer, bound as past and as present, so that
GroupQueryAttention writes in place; a buffer is as long as its session's capacity, and its pages cost memory
when they are first written.

Exactness: the quantised kernels take rows in tiles of 128, and a tile of one row rounds differently from all
others. Rows of a prompt are therefore run in even numbers, with an ignored last row where need be: then they agree
bit for bit however a prompt is cut into steps. Decode steps have one row and agree with each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from meshnode.core.errors import ModelError
from meshnode.engine.backend import Array
from meshnode.engine.cut import Cut, WeightlessGraph
from meshnode.engine.weights import Weights
from protocols.enginewire.messages import Load

_PARTS: Final = ("key", "value")


class _Segment:
    """One onnxruntime session over the layers [first, last), or the head (first == last == number of layers)."""

    def __init__(self, cut: Cut, first: int, last: int, values: dict[str, Any], threads: int) -> None:
        self.first, self.last = first, last
        self.start, self.end = cut.inputs[0], cut.outputs[0]
        self.masked = "attention_mask" in cut.inputs
        self.placed = "position_ids" in cut.inputs
        self._values = values  # onnxruntime reads these in place: they live as long as the session
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.enable_cpu_mem_arena = False  # it keeps the memory of the longest prompt and gains no speed
        # waiting threads that spin take the cores from the other engines of the machine
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # The first call has onnxruntime take the bytes from us and not from a file; the second one has it use
        # them where they are: without it, whatever is not packed for a kernel is copied (24 MB for ten layers
        # with an int4 embedding).
        options.add_external_initializers(list(values), list(values.values()))
        for name, value in values.items():
            options.add_initializer(name, value)
        try:
            self.session = ort.InferenceSession(cut.model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise ModelError(
                f"ONNX Runtime {ort.__version__} can't open the layers {first} to {last - 1}: {error}"
            ) from error


class OnnxStage:
    """Implements `Stage` (stage.py)."""

    def __init__(self, load: Load) -> None:
        """Cut, map and open the span. Raises ModelError."""
        self._load = load
        self._weights = Weights({group.name: Path(group.path) for group in load.groups})
        self._tables: dict[str, Array] = {}  # rotary tables, one of each for all segments
        self.ones = np.ones((1, load.context + 1), np.int64)  # attention masks are slices of it
        graph = WeightlessGraph(Path(load.graph))
        self._segments = [self._segment(graph, load.first, load.last)]
        self._head = self._segment(graph, load.layers, load.layers) if load.last == load.layers else None
        self.splits = 0  # how often the chain has changed
        self._weights.release()
        # in and out of one-row steps, bound once: tensor name -> array, and the same memory for onnxruntime
        self.single: dict[str, tuple[Array, Any]] = {}

    @property
    def weight_bytes(self) -> int:
        return self._weights.size

    def open(self, first: int, last: int, capacity: int) -> OnnxTrack:
        self.path(first, last)  # a split takes its time now, not in the first step
        return OnnxTrack(self, first, last, capacity)

    def path(self, first: int, last: int) -> list[_Segment]:
        """The segments of the layers [first, last), split where need be; the head after the last layer."""
        for border in (first, last):
            self._split(border)
        found = [s for s in self._segments if first <= s.first and s.last <= last]
        return [*found, self._head] if self._head is not None and last == self._load.layers else found

    def _split(self, border: int) -> None:
        for index, segment in enumerate(self._segments):
            if segment.first < border < segment.last:
                graph = WeightlessGraph(Path(self._load.graph))
                self._segments[index : index + 1] = [
                    self._segment(graph, segment.first, border),
                    self._segment(graph, border, segment.last),
                ]
                self.splits += 1
                self._weights.release()
                return

    def _segment(self, graph: WeightlessGraph, first: int, last: int) -> _Segment:
        cut = graph.head(last) if first == last else graph.layers(first, last)
        arrays = {name: self._weights.array(name, view) for name, view in cut.views.items()}
        for name, table in cut.tables.items():
            if name not in self._tables:
                self._tables[name] = table()
            arrays[name] = self._tables[name]
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        segment = _Segment(cut, first, last, values, self._load.threads)
        self._check(segment)
        return segment

    def _check(self, segment: _Segment) -> None:
        """Raise ModelError unless the segment takes exactly what a track binds."""
        load = self._load
        layers = range(segment.first, segment.last)
        wanted = {segment.start, *(f"past_key_values.{i}.{part}" for i in layers for part in _PARTS)}
        given = {value.name: value.shape for value in segment.session.get_inputs()}
        odd = (given.keys() - {"attention_mask", "position_ids"}) ^ wanted
        if odd:
            raise ModelError(f"The graph's inputs for the layers {layers} don't fit: {', '.join(sorted(odd)[:4])}.")
        for name in wanted - {segment.start}:
            _, heads, _, width = given[name]
            if (heads, width) != (load.kv_heads, load.head_dim):
                raise ModelError(
                    f"The graph keeps {heads} heads of {width} in {name}; the manifest says {load.kv_heads} "
                    f"of {load.head_dim}."
                )

    # ------------------------------------------------------------ what tracks use

    def keys_and_values(self, first: int, last: int, capacity: int) -> dict[str, Any]:
        """Zeroed buffers (1, heads, capacity, width) by the end of their names: `7.key`."""
        # one position more than asked: for the ignored row
        shape = (1, self._load.kv_heads, capacity + 1, self._load.head_dim)
        return {
            f"{layer}.{part}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for layer in range(first, last)
            for part in _PARTS
        }

    def rows(self, name: str, count: int) -> Array:
        """A new array for `count` rows of the tensor of this name."""
        if name == "input_ids":
            return np.empty((1, count), np.int64)
        width = self._load.vocab if name == "logits" else self._load.hidden
        return np.empty((1, count, width), np.float32)

    def one_row(self, name: str) -> tuple[Array, Any]:
        """The array of one-row steps for the tensor of this name."""
        if name not in self.single:
            array = self.rows(name, 1)
            self.single[name] = array, ort.OrtValue.ortvalue_from_numpy(array)
        return self.single[name]


class OnnxTrack:
    """Implements `Track` (stage.py)."""

    def __init__(self, stage: OnnxStage, first: int, last: int, capacity: int) -> None:
        self._stage = stage
        self._first, self._last = first, last
        self._kv = stage.keys_and_values(first, last, capacity)
        self._splits = -1
        self._path: list[_Segment] = []
        self._one: list[Any] = []  # bindings of one-row steps, one per segment of the path
        self._many: list[Any] = []

    def run(self, position: int, data: Array, *, prefill: bool, wanted: bool) -> Array:
        if self._splits != self._stage.splits:
            self._bind()
        if prefill or len(data) > 1:
            return self._run_many(position, data, wanted)
        return self._run_one(position, data, wanted)

    def _bind(self) -> None:
        self._splits = self._stage.splits
        self._path = self._stage.path(self._first, self._last)
        self._one = [self._binding(segment) for segment in self._path]
        self._many = [self._binding(segment) for segment in self._path]
        for segment, binding in zip(self._path, self._one, strict=True):
            binding.bind_ortvalue_input(segment.start, self._stage.one_row(segment.start)[1])
            binding.bind_ortvalue_output(segment.end, self._stage.one_row(segment.end)[1])

    def _binding(self, segment: _Segment) -> Any:
        binding = segment.session.io_binding()
        for layer in range(segment.first, segment.last):
            for part in _PARTS:
                buffer = self._kv[f"{layer}.{part}"]
                binding.bind_ortvalue_input(f"past_key_values.{layer}.{part}", buffer)
                binding.bind_ortvalue_output(f"present.{layer}.{part}", buffer)
        return binding

    def _run_one(self, position: int, data: Array, wanted: bool) -> Array:
        start = self._stage.one_row(self._path[0].start)[0]
        start[0, 0] = data[0]
        last = self._path[-1]
        for segment, binding in zip(self._path, self._one, strict=True):
            if segment is last and segment.end == "logits" and not wanted:
                return np.empty(0, np.float32)
            self._launch(segment, binding, position, 1)
        out: Array = self._stage.one_row(last.end)[0][0]
        return out[0] if last.end == "logits" else out

    def _run_many(self, position: int, data: Array, wanted: bool) -> Array:
        count = len(data)
        x = self._stage.rows(self._path[0].start, count + count % 2)
        x[0, :count] = data
        x[0, count:] = data[-1]
        for segment, binding in zip(self._path, self._many, strict=True):
            if segment.end == "logits":
                if not wanted:
                    return np.empty(0, np.float32)
                x = np.repeat(x[:, count - 1 : count], 2, axis=1)
            out = self._stage.rows(segment.end, x.shape[1])
            given, taken = ort.OrtValue.ortvalue_from_numpy(x), ort.OrtValue.ortvalue_from_numpy(out)
            binding.bind_ortvalue_input(segment.start, given)
            binding.bind_ortvalue_output(segment.end, taken)
            self._launch(segment, binding, position, x.shape[1])
            x = out
        rows: Array = x[0, 0] if self._path[-1].end == "logits" else x[0, :count]
        return rows

    def _launch(self, segment: _Segment, binding: Any, position: int, rows: int) -> None:
        if segment.masked:
            mask = ort.OrtValue.ortvalue_from_numpy(self._stage.ones[:, : position + rows])
            binding.bind_ortvalue_input("attention_mask", mask)
        if segment.placed:
            places = ort.OrtValue.ortvalue_from_numpy(np.arange(position, position + rows, dtype=np.int64)[None])
            binding.bind_ortvalue_input("position_ids", places)
        segment.session.run_with_iobinding(binding)
