"""A span of layers in ONNX Runtime, cut from the weightless graph over memory-mapped weights.

The span is a chain of segments; every segment is an onnxruntime session over a run of layers, the head is one
of its own, because a prompt needs the logits of its last row alone. A session that wants a part of a segment
splits it. Keys and values live in one buffer per layer, bound as past and as present, so that
GroupQueryAttention writes in place; a buffer is as long as its session's capacity, and its pages cost memory
when they are first written.

Adapters: the segments are plain until the first adapter comes; then those that it changes are opened anew with
optional inputs for its factors (`lora.py`), which each track binds for itself. Tracks without an adapter go on with
the same numbers.

Exactness: the quantised kernels take rows in tiles of 128, and a tile of one row rounds differently from all
others. Rows of a prompt are therefore run in even numbers, with an ignored last row where need be: then they agree
bit for bit however a prompt is cut into steps. Decode steps have one row and agree with each other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakSet

import numpy as np

from meshnode.core.errors import Declined, ModelError
from meshnode.engine.backend import Array, Factors, Rows
from meshnode.engine.cut import Cut, WeightlessGraph
from meshnode.engine.lora import Product, Widths, packed
from meshnode.engine.model_files import ModelFiles
from meshnode.engine.runtime import ort
from meshnode.model.adapter_file import Pair
from protocols.enginewire.messages import BAD_ADAPTER, BUSY, Load
from protocols.words import layers

_PARTS: Final = ("key", "value")
_BAD_ALLOC: Final = "bad_alloc"  # in what onnxruntime says when the process may not take more memory


class _Segment:
    """One onnxruntime session over the layers [first, last), or the head (first == last == number of layers)."""

    def __init__(self, cut: Cut, first: int, last: int, values: dict[str, Any], threads: int) -> None:
        self.first, self.last = first, last
        self.start, self.end = cut.inputs[0], cut.outputs[0]
        self.masked = "attention_mask" in cut.inputs
        self.placed = "position_ids" in cut.inputs
        self.adapted = cut.products
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
            if _BAD_ALLOC in str(error):
                raise MemoryError from error
            raise ModelError(f"ONNX Runtime {ort.__version__} can't open {layers(first, last)}: {error}") from error


@dataclass(frozen=True, slots=True)
class OnnxFactors:
    """Implements `Factors` (backend.py): the optional inputs of one layer."""

    values: Mapping[str, Any]  # name -> OrtValue over one of the arrays
    arrays: Sequence[Array]  # the memory behind them

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


@dataclass(slots=True)
class OnnxRows:
    """Implements `Rows` (backend.py)."""

    arrays: dict[str, Array]  # (heads, rows, width) by the end of their names: `7.key`


class OnnxStage:
    """Implements `Stage` (backend.py)."""

    def __init__(self, load: Load, files: ModelFiles | None = None) -> None:
        """Cut, map and open the span. Raises ModelError, MemoryError. `files`: of the load, if they are open."""
        self._load = load
        files = files or ModelFiles(load)
        self._weights, self._file = files.weights, files.graph
        self._tables: dict[str, Array] = {}  # rotary tables, one of each for all segments
        self.ones = np.ones((1, load.context + 1), np.int64)  # attention masks are slices of it
        self._widths = Widths(query=load.heads * load.head_dim, key=load.kv_heads * load.head_dim)
        self._adapted: list[Product] = []  # products that take factors
        self._tracks: WeakSet[OnnxTrack] = WeakSet()
        graph = WeightlessGraph(self._file)
        self._segments = [self._segment(graph, load.first, load.last)]
        self._head = self._segment(graph, load.layers, load.layers) if load.last == load.layers else None
        self._norm: _Segment | None = None  # opened when it is first wanted
        self.splits = 0  # how often the chain has changed
        self._weights.release()
        # in and out of one-row steps, bound once: tensor name -> array, and the same memory for onnxruntime
        self.single: dict[str, tuple[Array, Any]] = {}

    @property
    def weight_bytes(self) -> int:
        return self._weights.size

    def open(
        self, first: int, last: int, capacity: int, factors: Mapping[int, Factors] = {}, *, normed: bool = False
    ) -> OnnxTrack:
        self.path(first, last, normed=normed)  # a split takes its time now, not in the first step
        track = OnnxTrack(self, first, last, capacity, factors, normed)
        self._tracks.add(track)
        return track

    def adapt(self, first: int, last: int, targets: Collection[str]) -> None:
        wanted = {(layer, target) for layer in range(first, last) for target in targets}
        if wanted <= _places(self._adapted):
            return
        graph = WeightlessGraph(self._file)
        found = graph.products(self._widths)
        for layer, target in sorted(wanted - _places(found)):
            raise Declined(
                BAD_ADAPTER, f"The graph of this model has no {target} in layer {layer} that takes an adapter."
            )
        before = self._adapted
        # what the first one needs; all for the next one, so that whoever asks holds up the others twice at most
        chosen = found if before else [product for product in found if _places([product]) & wanted]
        borders = [(segment.first, segment.last) for segment in self._segments]
        try:
            self._reopen(graph, borders, chosen)
        except (MemoryError, ModelError) as error:
            self._reopen(graph, borders, before)
            if isinstance(error, MemoryError):
                raise Declined(BUSY, "This node has no memory to open its layers for an adapter.") from error
            raise Declined(BAD_ADAPTER, f"The layers can't be opened for an adapter: {error}") from error

    def _reopen(self, graph: WeightlessGraph, borders: Sequence[tuple[int, int]], adapted: list[Product]) -> None:
        """Have these segments, with inputs for `adapted`. What changes is let go first, for its memory."""
        if adapted == self._adapted and len(self._segments) == len(borders):
            return
        for track in self._tracks:
            track.unbind()
        self._adapted = adapted
        kept = {(s.first, s.last): s for s in self._segments if s.adapted == self._adapted_of(s.first, s.last)}
        self._segments = list(kept.values())
        self._segments = [kept.get(border) or self._segment(graph, *border) for border in borders]
        self._weights.release()

    def _adapted_of(self, first: int, last: int) -> tuple[Product, ...]:
        return tuple(product for product in self._adapted if first <= product.layer < last)

    def factors(self, layer: int, pairs: Mapping[str, Pair], scale: float) -> OnnxFactors:
        products = [product for product in self._adapted if product.layer == layer]
        known = {target: product for product in products for target in product.columns}
        for target, pair in pairs.items():
            product = known.get(target)
            if product is None:
                raise Declined(BAD_ADAPTER, f"The adapter has {target} in layer {layer}, which it did not announce.")
            sizes, due = (pair.a.shape[1], pair.b.shape[0]), (product.inputs, len(product.columns[target]))
            if sizes != due:
                raise Declined(
                    BAD_ADAPTER,
                    f"The adapter takes {target} of layer {layer} for a matrix with {sizes[0]} inputs and {sizes[1]} "
                    f"outputs; in the graph of this model it has {due[0]} and {due[1]}.",
                )
        values: dict[str, Any] = {}
        arrays: list[Array] = []
        for product in products:
            for name, array in zip(product.names, packed(product, pairs, scale), strict=False):
                arrays.append(array)
                values[name] = ort.OrtValue.ortvalue_from_numpy(array)
        return OnnxFactors(values, arrays)

    def path(self, first: int, last: int, *, normed: bool) -> list[_Segment]:
        """The segments of the layers [first, last), split where need be; after the last layer the head, or if
        `normed` the final norm alone."""
        for border in (first, last):
            self._split(border)
        found = [s for s in self._segments if first <= s.first and s.last <= last]
        if self._head is None or last < self._load.layers:
            return found
        if normed and self._norm is None:
            self._norm = self._opened(WeightlessGraph(self._file).norm(last), last, last)
            self._weights.release()
        return [*found, self._norm if normed and self._norm is not None else self._head]

    def _split(self, border: int) -> None:
        for index, segment in enumerate(self._segments):
            if segment.first < border < segment.last:
                graph = WeightlessGraph(self._file)
                self._segments[index : index + 1] = [
                    self._segment(graph, segment.first, border),
                    self._segment(graph, border, segment.last),
                ]
                self.splits += 1
                self._weights.release()
                return

    def _segment(self, graph: WeightlessGraph, first: int, last: int) -> _Segment:
        cut = graph.head(last) if first == last else graph.layers(first, last, self._adapted)
        return self._opened(cut, first, last)

    def _opened(self, cut: Cut, first: int, last: int) -> _Segment:
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
        numbers = range(segment.first, segment.last)
        wanted = {segment.start, *(f"past_key_values.{i}.{part}" for i in numbers for part in _PARTS)}
        given = {value.name: value.shape for value in segment.session.get_inputs()}
        odd = (given.keys() - {"attention_mask", "position_ids"}) ^ wanted
        if odd:
            raise ModelError(
                f"The graph's inputs for {layers(segment.first, segment.last)} don't fit: "
                f"{', '.join(sorted(odd)[:4])}."
            )
        for name in wanted - {segment.start}:
            _, heads, _, width = given[name]
            if (heads, width) != (load.kv_heads, load.head_dim):
                raise ModelError(
                    f"The graph keeps {heads} heads of {width} in {name}; the manifest says {load.kv_heads} "
                    f"of {load.head_dim}."
                )

    # ------------------------------------------------------------ what tracks use

    def keys_and_values(self, first: int, last: int, capacity: int) -> dict[str, Array]:
        """Zeroed buffers (1, heads, capacity, width) by the end of their names: `7.key`."""
        # one position more than asked: for the ignored row
        shape = (1, self._load.kv_heads, capacity + 1, self._load.head_dim)
        return {f"{layer}.{part}": np.zeros(shape, np.float32) for layer in range(first, last) for part in _PARTS}

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


def _places(products: Sequence[Product]) -> set[tuple[int, str]]:
    """Layers and targets that these products stand for."""
    return {(product.layer, target) for product in products for target in product.columns}


class OnnxTrack:
    """Implements `Track` (backend.py)."""

    def __init__(
        self,
        stage: OnnxStage,
        first: int,
        last: int,
        capacity: int,
        factors: Mapping[int, Factors],
        normed: bool,
    ) -> None:
        self._stage = stage
        self._normed = normed
        self._first, self._last = first, last
        self._owners = tuple(factors.values())  # of the memory behind the inputs
        self._factors: dict[str, Any] = {}
        for given in self._owners:
            assert isinstance(given, OnnxFactors)  # this stage made them
            self._factors.update(given.values)
        self._buffers = stage.keys_and_values(first, last, capacity)
        # onnxruntime reads and writes them in place
        self._kv = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self._buffers.items()}
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

    def keep(self, count: int) -> OnnxRows:
        self.unbind()
        self._kv = {}
        kept: dict[str, Array] = {}
        while self._buffers:  # each is let go before the next one is copied
            name, buffer = self._buffers.popitem()
            kept[name] = buffer[0, :, :count].copy()
        return OnnxRows(kept)

    def fill(self, rows: Rows, count: int, *, move: bool) -> None:
        assert isinstance(rows, OnnxRows)  # this stage made them
        for name, buffer in self._buffers.items():
            buffer[0, :, :count] = (rows.arrays.pop(name) if move else rows.arrays[name])[:, :count]

    def unbind(self) -> None:
        """Let go of the segments; the next step binds those that are there then."""
        self._splits = -1
        self._path, self._one, self._many = [], [], []

    def _bind(self) -> None:
        self._splits = self._stage.splits
        self._path = self._stage.path(self._first, self._last, normed=self._normed)
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
        for product in segment.adapted:
            for name in product.names:
                if name in self._factors:
                    binding.bind_ortvalue_input(name, self._factors[name])
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
        try:
            segment.session.run_with_iobinding(binding)
        except RuntimeError as error:  # what onnxruntime makes of everything
            if _BAD_ALLOC in str(error):
                raise MemoryError from None
            raise ModelError(
                f"ONNX Runtime {ort.__version__} can't compute {layers(segment.first, segment.last)}: {error}"
            ) from error
