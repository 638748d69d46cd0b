"""The file of a graph: compressed or not, of a sane size; and graphs that hold their rotary tables themselves."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from meshnode.core.errors import ModelError
from meshnode.engine import graph_file
from meshnode.engine.backend import Array
from meshnode.engine.cut import WeightlessGraph
from meshnode.engine.graph_file import MAX_GRAPH_BYTES, open_graph, pack_graph, read_graph
from meshnode.engine.onnx_stage import OnnxStage
from meshnode.engine.port import StageSpec
from meshnode.engine.requests import load_request
from meshnode.engine.rotary import Rotary, is_placeholder, parse
from tests.conformance.tiny_model import tiny_models

MODEL = onnx.ModelProto(ir_version=11, producer_name="meshnode", graph=onnx.GraphProto(name="model" * 800))


def test_packed_and_plain_files_are_read(tmp_path: Path) -> None:
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    packed.write_bytes(pack_graph(MODEL))
    plain.write_bytes(MODEL.SerializeToString())
    assert packed.stat().st_size < plain.stat().st_size / 10
    assert read_graph(packed) == read_graph(plain) == MODEL


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pack_graph(MODEL)[:-5], "is damaged: it is cut off"),
        (pack_graph(MODEL) + b"more", "is damaged: something follows"),
        (b"\x78\xda" + b"\xff" * 100, "is damaged"),
        (zlib.compress(b"\xff" * 1000), "is damaged"),
        (b"\xff" * 1000, "is damaged"),
    ],
)
def test_a_damaged_file_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "graph"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"graph {words}.*fetch it again"):
        read_graph(path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "graph"
    path.write_bytes(zlib.compress(bytes(MAX_GRAPH_BYTES + 1)))
    with pytest.raises(ModelError, match="unpacks to more than 64 MiB"):
        read_graph(path)


def test_a_large_file_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_file, "MAX_GRAPH_BYTES", 1000)
    path = tmp_path / "graph"
    path.write_bytes(bytes(1001))
    with pytest.raises(ModelError, match="larger than"):
        read_graph(path)


def with_tables(spec: StageSpec, path: Path) -> StageSpec:
    """The same span with a graph file of the plain kind: not compressed, tables inside."""
    model = read_graph(spec.graph)
    for tensor in model.graph.initializer:
        if is_placeholder(tensor):
            tensor.CopyFrom(onnx.numpy_helper.from_array(parse(tensor).table(), tensor.name))
    path.write_bytes(model.SerializeToString())
    return replace(spec, graph=path)


def hidden_states(spec: StageSpec) -> Array:
    stage = OnnxStage(load_request(spec))
    rows = np.random.default_rng(5).standard_normal((40, spec.architecture.hidden)).astype(np.float32)
    track = stage.open(spec.first, spec.last, 64)
    return np.array(track.run(0, rows, prefill=True, wanted=False))


def test_a_graph_with_its_tables_inside_gives_the_same(tmp_path: Path) -> None:
    spec = tiny_models()["int4"].spec(1, 3)
    inside = with_tables(spec, tmp_path / "graph.onnx")
    assert inside.graph.stat().st_size > 10 * spec.graph.stat().st_size
    computed, read = (WeightlessGraph(open_graph(s.graph)).layers(1, 3) for s in (spec, inside))
    assert computed.model == read.model
    assert len(computed.tables) == 2
    for name, table in computed.tables.items():
        assert np.array_equal(table(), read.tables[name]())
    assert np.array_equal(hidden_states(spec), hidden_states(inside))


def test_segments_of_a_span_share_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    table = Rotary.table

    def counted(rotary: Rotary) -> Array:
        made.append(rotary.function)
        return table(rotary)

    monkeypatch.setattr(Rotary, "table", counted)
    stage = OnnxStage(load_request(tiny_models()["fp32"].spec(0, 4)))
    for border in (1, 2, 3):
        stage.path(0, border, normed=False)
    assert stage.splits == 3
    assert sorted(made) == ["cos", "sin"]
