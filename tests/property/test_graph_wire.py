"""Any bytes are refused, or are a graph that every library reads alike; a refusal costs what the bytes cost."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.core.errors import ModelError
from meshnode.engine import trial
from meshnode.engine.cut import WeightlessGraph
from meshnode.engine.graph_check import check_graph
from meshnode.engine.graph_file import GraphFile
from meshnode.engine.graph_wire import Refused, scan
from tests.hostile import cost, mutated, varint


@cache
def good() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        graph = Path(name) / "graph"
        trial._write_model(graph, Path(name) / "weights")
        return graph.read_bytes()


BYTES = mutated(st.just(None).map(lambda _: good()), most=4)


def fields(depth: int) -> st.SearchStrategy[bytes]:
    """Protobuf fields: numbers and types that onnx.proto has, mostly, filled at random."""
    number = st.sampled_from((*range(1, 17), 20, 21, 22, 23, 25, 26, 99, 1 << 20))
    leaf = st.one_of(st.binary(max_size=12), st.sampled_from((b"Constant", b"value", b"location", b"node.key")))
    inside = st.one_of(leaf, fields(depth - 1)) if depth else leaf
    text = st.builds(lambda n, data: varint(n << 3 | 2) + varint(len(data)) + data, number, inside)
    whole = st.builds(lambda n, value: varint(n << 3) + varint(value), number, st.integers(0, (1 << 64) - 1))
    fixed = st.builds(lambda n, data: varint(n << 3 | 5) + data, number, st.binary(min_size=4, max_size=4))
    return st.lists(st.one_of(text, whole, fixed), max_size=5).map(b"".join)


def read_by_everybody(content: bytes) -> None:
    """What the scanner lets through has no field that a library would drop, but values of its two enumerations."""
    try:
        scan(content)
    except Refused as error:
        assert str(error) and len(str(error)) < 600
        return
    try:
        model = onnx.load_from_string(content)
    except DecodeError:  # text that is no UTF-8, for instance; such a file is called damaged
        return
    size = model.ByteSize()
    model.DiscardUnknownFields()
    most = 3 * (content.count(b"\xa0\x01") + content.count(b"\x70"))  # the tags of AttributeProto.type, data_location
    assert size - model.ByteSize() <= 4 * most


@settings(max_examples=300)
@given(BYTES)
def test_injured_graphs(content: bytes) -> None:
    read_by_everybody(content)


@settings(max_examples=300)
@given(fields(5))
def test_made_up_fields(content: bytes) -> None:
    read_by_everybody(content)
    read_by_everybody(b"\x08\x0a\x3a" + varint(len(content)) + content)


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_noise(content: bytes) -> None:
    read_by_everybody(content)


@settings(max_examples=300)
@given(BYTES)
def test_whatever_is_accepted_can_be_cut_or_is_refused_in_words(content: bytes) -> None:
    """Nothing but ModelError comes out, and what is cut holds no place of a file."""
    with suppress(ModelError):
        graph = WeightlessGraph(GraphFile("g", content))
        for cut in (graph.layers(0, 1), graph.head(1)):
            check_graph(onnx.load_from_string(cut.model), cut=True)


@settings(max_examples=100)
@given(mutated(fields(5), most=2))
def test_a_refusal_is_cheap(content: bytes) -> None:
    paid = cost(lambda: scan(content), Refused)
    assert paid.calls <= 60 + 6 * len(content)
    assert paid.peak <= 20_000 + 20 * len(content)
