"""What a graph may not hold: files, graphs inside of it, unknown operators, sizes without bound. Each is named."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import trio
from onnx import AttributeProto, TensorProto, helper

from meshnode.core.errors import ModelError
from meshnode.engine import trial
from meshnode.engine.cut import WeightlessGraph
from meshnode.engine.graph_check import HANDED_OVER, MAX_CONSTANT_BYTES, MAX_ENDS, check_graph
from meshnode.engine.graph_file import GraphFile, open_graph, pack_graph
from meshnode.engine.graph_wire import MAX_WORDS, Refused, scan
from meshnode.engine.operators import OPERATORS, VERSIONS
from meshnode.engine.process import EngineProcess

Change = Callable[[onnx.ModelProto], object]
CONTRIB = "com.microsoft"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The graph of the trial model: one layer, a quantised head, weights in group files."""
    folder = tmp_path_factory.mktemp("trial")
    trial._write_model(folder / "graph", folder / "weights")
    return (folder / "graph").read_bytes()


def changed(good: bytes, change: Change) -> GraphFile:
    model = onnx.load_from_string(good)
    change(model)
    return GraphFile("bafyGRAPH", model.SerializeToString())


def refused(file: GraphFile) -> str:
    with pytest.raises(ModelError) as caught:
        file.model()
    assert "bafyGRAPH" in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- what is put in


def outside(location: str = "node.key", **more: str) -> TensorProto:
    """A tensor in a file."""
    tensor = TensorProto(name="outside", dims=[8], data_type=TensorProto.UINT8, data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": location, "offset": "0", "length": "8"} | more).items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def sparse(values: TensorProto) -> onnx.SparseTensorProto:
    values.name = "sparse"
    return onnx.SparseTensorProto(
        values=values, indices=helper.make_tensor("at", TensorProto.INT64, [1], [0]), dims=[8]
    )


def body(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    """A graph for the inside of a node."""
    return helper.make_graph(list(nodes), "body", [], [helper.make_tensor_value_info("y", TensorProto.UINT8, [8])])


def constant(tensor: Any, name: str = "y") -> onnx.NodeProto:
    node = onnx.NodeProto(op_type="Constant", output=[name], name="reading")
    node.attribute.append(helper.make_attribute("value", tensor))
    return node


def node(operator: str, domain: str = "", **attributes: Any) -> Change:
    return lambda m: m.graph.node.append(
        helper.make_node(operator, ["input_ids"], ["added"], name="added node", domain=domain, **attributes)
    )


def attribute(index: int = 0, **fields: Any) -> Change:
    """Put fields into an attribute of a node that is there."""

    def change(m: onnx.ModelProto) -> None:
        with_any = next(n for n in m.graph.node if n.attribute)
        with_any.attribute[index].MergeFrom(AttributeProto(**fields))

    return change


def initializer(**fields: Any) -> Change:
    return lambda m: m.graph.initializer.append(TensorProto(**{"name": "added", **fields}))


def place(**entries: str | None) -> Change:
    """Change the place of the first tensor that is in a file."""

    def change(m: onnx.ModelProto) -> None:
        tensor = next(t for t in m.graph.initializer if t.data_location == TensorProto.EXTERNAL)
        given = {e.key: e.value for e in tensor.external_data} | entries
        del tensor.external_data[:]
        for key, value in given.items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)

    return change


def elsewhere() -> dict[str, Any]:
    return {"external_data": outside().external_data}


def twice() -> onnx.NodeProto:
    out = helper.make_node("Softmax", ["input_ids"], ["y"], axis=1)
    out.attribute.append(helper.make_attribute("axis", 1))
    return out


def loop(inner: onnx.GraphProto, operator: str = "Loop", name: str = "body") -> Change:
    return node(operator, **{name: inner})


def function(m: onnx.ModelProto) -> None:
    m.functions.append(
        helper.make_function("own", "F", [], ["y"], [constant(outside())], [helper.make_opsetid("", 21)])
    )
    m.graph.node.append(helper.make_node("F", [], ["z"], domain="own"))


DEEP = body(constant(outside()))
for _ in range(20):
    DEEP = body(helper.make_node("If", ["c"], ["y"], then_branch=DEEP))

FILES: dict[str, tuple[Change, str]] = {
    "constant": (
        lambda m: m.graph.node.append(constant(outside())),
        r"node 'reading' .*attribute 'value'.*in a file",
    ),
    "constant, place alone": (
        lambda m: m.graph.node.append(
            constant(
                TensorProto(
                    dims=[8],
                    data_type=2,
                    raw_data=bytes(8),
                    external_data=outside().external_data,
                )
            )
        ),
        "tensor in a file",
    ),
    "constant, memory": (
        lambda m: m.graph.node.append(constant(outside("*/_ORT_MEM_ADDR_/*", offset="4096"))),
        "tensor in a file",
    ),
    "constant, sparse": (
        lambda m: m.graph.node.append(
            helper.make_node("Constant", [], ["y"], name="thin", sparse_value=sparse(outside()))
        ),
        "node 'thin': sparse_tensor of a AttributeProto may not be",
    ),
    "constant of shape": (
        lambda m: m.graph.node.append(helper.make_node("ConstantOfShape", ["s"], ["y"], value=outside())),
        "'ConstantOfShape', which is not among the operators",
    ),
    "an operator of trees": (
        lambda m: m.graph.node.append(
            helper.make_node("TreeEnsemble", ["x"], ["y"], domain="ai.onnx.ml", nodes_splits=outside())
        ),
        r"'ai\.onnx\.ml\.TreeEnsemble'",
    ),
    "tensor in an attribute that is none": (
        lambda m: m.graph.node.append(helper.make_node("Cast", ["x"], ["y"], name="c", to=outside())),
        "'to' is not of the type int",
    ),
    "tensor beside a number": (attribute(t=outside()), "has two values|may not be|not of the type"),
    "list of tensors": (attribute(tensors=[outside()]), "tensors of a AttributeProto may not be"),
    "sparse initializer": (
        lambda m: m.graph.sparse_initializer.append(sparse(outside())),
        "sparse_initializer of a GraphProto may not be",
    ),
    "loop": (loop(body(constant(outside()))), "node 'added node': g of a AttributeProto may not be"),
    "if": (loop(body(), "If", "then_branch"), "g of a AttributeProto"),
    "scan": (loop(body(), "Scan"), "g of a AttributeProto"),
    "graphs": (attribute(graphs=[body(constant(outside()))]), "graphs of a AttributeProto"),
    "nested": (loop(DEEP), "g of a AttributeProto"),
    "function": (function, "functions of a ModelProto may not be"),
    "training": (
        lambda m: m.training_info.append(onnx.TrainingInfoProto(algorithm=body(constant(outside())))),
        "training_info of a ModelProto may not be",
    ),
    "initializer": (
        lambda m: m.graph.initializer.append(outside()),
        "'outside': it is in 'node.key', which is no group",
    ),
    "absolute": (place(location="/etc/passwd"), "'/etc/passwd', which is no group"),
    "upwards": (place(location="../node.key"), "no group of layers"),
    "below a group": (place(location="embed/../../node.key"), "no group of layers"),
    "memory": (place(location="*/_ORT_MEM_ADDR_/*"), "no group of layers"),
    "handed over": (place(location=HANDED_OVER), "no group of layers"),
    "nameless": (place(location=""), "no group of layers"),
    "layer 01": (place(location="layer.01"), "no group of layers"),
    "layer -1": (place(location="layer.-1"), "no group of layers"),
    "new line": (place(location="embed\n"), "no group of layers"),
    "no place": (place(location=None), "no group of layers"),
    "negative offset": (place(offset="-8"), "offset or the length .* no number"),
    "endless offset": (place(offset="9" * 5000), "no number"),
    "offset in letters": (place(offset="0x10"), "no number"),
    "no offset": (place(offset=None), "a location, an offset and a length"),
    "checksum": (place(checksum="0"), "a location, an offset and a length"),
    "wrong length": (place(length="9"), "its place has 9 bytes, its shape says"),
    "two locations": (
        lambda m: m.graph.initializer[0].external_data.add(key="location", value="node.key"),
        "'location' is there twice",
    ),
    "rotary with a place": (place(location="rotary"), "a rotary table has no place"),
}
OPERATORS_AND_SIZES: dict[str, tuple[Change, str]] = {
    "unknown operator": (node("ReadFile"), "'ReadFile', which is not among the operators"),
    "context of another runtime": (
        node("EPContext", CONTRIB, ep_cache_context="node.key"),
        "'com.microsoft.EPContext'",
    ),
    "Python in a graph": (node("PythonOp", CONTRIB), "not among the operators"),
    "a call of the system": (node("Snpe", CONTRIB, DLC="x"), "not among the operators"),
    "internal layouts": (node("Conv", "com.microsoft.nchwc"), "not among the operators"),
    "unknown domain": (node("Add", "ai.onnx.contrib"), r"'ai\.onnx\.contrib\.Add'"),
    "extensions": (node("BertTokenizer", "ai.onnx.contrib"), "not among the operators"),
    "standard operator of the other domain": (node("MatMulNBits"), "not among the operators"),
    "random": (node("RandomNormal", shape=[1 << 40]), "not among the operators"),
    "range": (node("Range"), "not among the operators"),
    "strings": (node("StringConcat"), "not among the operators"),
    "weights laid out for a kernel": (node("MatMulNBits", CONTRIB, weight_prepacked=1), "'weight_prepacked' is not"),
    "unknown attribute": (node("Add", path="x"), "'added node' .*'path' is not among those"),
    "attribute of another type": (node("Softmax", axis=1.0), "'axis' is not of the type int"),
    "attribute twice": (lambda m: [attribute()(m), m.graph.node.append(twice())], "'axis' is there twice"),
    "long word": (node("Gelu", approximate="x" * 65), "no word of at most 64"),
    "letters": (node("Gelu", approximate="\u202e"), "no word of at most 64"),
    "attribute of a function": (attribute(ref_attr_name="x"), "ref_attr_name of a AttributeProto may not be"),
    "operator set of others": (
        lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx.contrib", 1)),
        "operator set 'ai.onnx.contrib', which is not one of ours",
    ),
    "old operator set": (lambda m: setattr(m.opset_import[0], "version", 6), "wants version 6 of"),
    "operator set of the future": (
        lambda m: setattr(m.opset_import[0], "version", 1 << 40),
        "wants version 1099511627776",
    ),
    "operator set twice": (lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 21)), "'' is there twice"),
    "no version": (lambda m: setattr(m, "ir_version", 0), "IR version 0"),
    "huge dimension": (initializer(dims=[1 << 40], data_type=1), "a dimension of its shape"),
    "negative dimension": (initializer(dims=[-1], data_type=1), "a dimension of its shape"),
    "huge product": (initializer(dims=[1 << 30] * 8, data_type=1), "bytes inside the graph"),
    "many dimensions": (initializer(dims=[1] * 9, data_type=1), "9 dimensions"),
    "strings as a tensor": (initializer(dims=[1], data_type=8, string_data=[b"x"]), "string_data of a TensorProto"),
    "unknown data type": (initializer(dims=[1], data_type=99), "data type 99"),
    "fewer elements than its shape": (
        initializer(dims=[3], data_type=1, float_data=[1]),
        "1 elements, its shape says 3",
    ),
    "fewer bytes than its shape": (
        initializer(dims=[3], data_type=1, raw_data=bytes(4)),
        "4 bytes, its shape says 12",
    ),
    "elements twice": (initializer(dims=[1], data_type=1, float_data=[1], raw_data=bytes(4)), "elements twice"),
    "elements of another type": (initializer(dims=[1], data_type=1, int64_data=[1]), "of another type"),
    "here and elsewhere": (
        initializer(dims=[8], data_type=2, raw_data=bytes(8), **elsewhere()),
        "here and elsewhere",
    ),
    "segment": (initializer(dims=[1], data_type=1, segment=TensorProto.Segment(begin=0)), "segment of a TensorProto"),
    "large constant": (
        lambda m: m.graph.node.append(
            constant(onnx.numpy_helper.from_array(np.zeros(MAX_CONSTANT_BYTES + 1, np.uint8)))
        ),
        "bytes inside the graph",
    ),
    "two initializers of a name": (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "is there twice"),
    "two nodes of an output": (lambda m: m.graph.node.append(m.graph.node[0]), "is there twice"),
    "node that shadows a weight": (
        lambda m: m.graph.node.append(helper.make_node("Neg", ["input_ids"], [m.graph.initializer[0].name])),
        "is there twice",
    ),
    "input that shadows a node": (
        lambda m: m.graph.input.append(helper.make_tensor_value_info(m.graph.node[0].output[0], 1, [1])),
        "is there twice",
    ),
    "many inputs": (
        lambda m: m.graph.node.append(helper.make_node("Concat", ["input_ids"] * (MAX_ENDS + 1), ["y"], axis=0)),
        f"more than {MAX_ENDS} inputs",
    ),
    "long name": (lambda m: setattr(m.graph.node[0], "name", "x" * (MAX_WORDS + 1)), f"{MAX_WORDS} are allowed"),
    "metadata": (lambda m: m.metadata_props.add(key="ort_config", value="{}"), "metadata_props of a ModelProto"),
    "sequence": (
        lambda m: m.graph.input.append(helper.make_tensor_sequence_value_info("s", 1, None)),
        "value 's': sequence_type of a TypeProto may not be",
    ),
    "value of strings": (
        lambda m: m.graph.input.append(helper.make_tensor_value_info("s", 8, [1])),
        "'s' is of a type",
    ),
    "huge value": (lambda m: m.graph.input.append(helper.make_tensor_value_info("s", 1, [1 << 40])), "too large"),
    "terminal codes": (node("\x1b[2J"), r"'\\x1b\[2J'"),
}


def test_the_good_one(good: bytes) -> None:
    model = GraphFile("g", good).model()
    assert model == onnx.load_from_string(good)
    assert GraphFile("g", pack_graph(model)).model() == model


@pytest.mark.parametrize("name", FILES)
def test_nothing_reaches_a_file(good: bytes, name: str) -> None:
    change, words = FILES[name]
    text = refused(changed(good, change))
    assert re.search(words, text, re.DOTALL), text


@pytest.mark.parametrize("name", OPERATORS_AND_SIZES)
def test_operators_and_sizes(good: bytes, name: str) -> None:
    change, words = OPERATORS_AND_SIZES[name]
    text = refused(changed(good, change))
    assert re.search(words, text, re.DOTALL), text
    assert "\x1b" not in text and len(text) < 1000


def test_every_listed_operator_is_one_of_onnxruntime() -> None:
    """A name or an attribute that nobody knows would be a slip of the pen. Their types are onnxruntime's, too."""
    from meshnode.engine.runtime import ort

    known: dict[tuple[str, str], dict[str, set[str]]] = {}
    for schema in ort.capi.onnxruntime_pybind11_state.get_all_operator_schema():
        attributes = known.setdefault((schema.domain, schema.name), {})
        for name, described in schema.attributes.items():
            attributes.setdefault(name, set()).add(str(described.type).rpartition(".")[2].lower())
    for domain, operators in OPERATORS.items():
        for operator, listed in operators.items():
            given = known[domain, operator]
            # mobius writes it, onnxruntime takes it from the table's width
            given |= {"rotary_embedding_dim": {"int"}} if operator == "GroupQueryAttention" else {}
            assert all(kind in given.get(name, ()) for name, kind in listed.items()), operator
    assert VERSIONS.keys() == OPERATORS.keys()


# ---------------------------------------------------------------- the bytes


def test_every_truncation_is_refused_or_is_a_graph(good: bytes) -> None:
    """Cut between two fields of the model, what is left is a model without a graph or an operator set."""
    for size in range(len(good)):
        file = GraphFile("bafyGRAPH", good[:size])
        try:
            model = file.model()
        except ModelError:
            continue
        assert model.SerializeToString() == good[:size]


def deep(levels: int) -> bytes:
    """If in If in If, as bytes: libraries give up at a hundred levels."""
    inner = b""
    for _ in range(levels):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # g, attribute, node
            inner = tag + length(inner) + inner
    return b"\x08\x0a\x3a" + length(inner) + inner


def length(data: bytes) -> bytes:
    out, number = b"", len(data)
    while number > 0x7F:
        out, number = out + bytes((number & 0x7F | 0x80,)), number >> 7
    return out + bytes((number,))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (deep(5000), "g of a AttributeProto"),
        (b"\x08\x0a" * 5_000_000, "more than 4194304 fields"),
        (b"\x3a" + length(b"\x0a\x00" * 5_000_000) + b"\x0a\x00" * 5_000_000, "more than 4194304 fields"),
        (b"\x3a\x00\x3a\x00", "graph of a ModelProto occurs twice"),
        (b"\x0b\x0c", "wire type 3"),
        (b"\x09" + bytes(8), "wire type 1"),
        (b"\x00\x00", "unknown field 0 of a ModelProto"),
        (b"\xf8\xff\xff\xff\xff\xff\xff\xff\xff\x01\x00", "unknown field"),
        (b"\x3a\x05abc", "cut off"),
        (b"\x08", "cut off"),
        (b"\x08" + b"\xff" * 10, "more than 64 bits"),
        (b"\x08" + b"\xff" * 9 + b"\x7f", "more than 64 bits"),
        (b"\x3a" + length(bytes(5)) + b"\x0a\x03\x2a\x01\x15", "cut off|wire type"),
    ],
    ids=range(13),
)
def test_bytes_that_are_refused_before_they_are_parsed(
    content: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "load_from_string", lambda _: pytest.fail("it was parsed"))
    for packed in (content, zlib.compress(content)):
        assert re.search(words, refused(GraphFile("bafyGRAPH", packed)))


def test_the_words_name_the_tensor(good: bytes) -> None:
    model = onnx.load_from_string(good)
    model.graph.initializer.append(TensorProto(name="thing", dims=[1], data_type=11, double_data=[1.0]))
    with pytest.raises(Refused, match="the tensor 'thing': double_data of a TensorProto may not be in a graph"):
        scan(model.SerializeToString())


# ---------------------------------------------------------------- what onnxruntime gets


def test_a_cut_model_has_no_place_of_a_file(good: bytes, tmp_path: Path) -> None:
    graph = WeightlessGraph(GraphFile("g", good))
    for cut in (graph.layers(0, 1), graph.head(1)):
        model = onnx.load_from_string(cut.model)
        outside = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
        assert {t.name for t in outside} == cut.views.keys() | cut.tables.keys()
        assert {entry.value for t in outside for entry in t.external_data} == {HANDED_OVER}
        check_graph(model, cut=True)
        with pytest.raises(Refused, match="is in 'given'"):
            check_graph(model)
    with pytest.raises(Refused, match="it is in a file, and a cut model has none"):
        check_graph(onnx.load_from_string(good), cut=True)


@pytest.mark.process
@pytest.mark.parametrize("name", ["constant", "initializer", "if", "function", "unknown operator"])
async def test_an_engine_refuses_it_in_a_sentence(good: bytes, name: str, tmp_path: Path) -> None:
    change, words = {**FILES, **OPERATORS_AND_SIZES}[name]
    spec = trial._spec("onnx", tmp_path)
    bad = changed(good, change)
    spec.graph.write_bytes(bad.content)
    engine = EngineProcess(replace(spec, graph_name="bafyGRAPH"))
    with trio.fail_after(60), pytest.raises(ModelError, match=f"graph bafyGRAPH is not run: .*{words}"):
        await engine.start()


@pytest.mark.process
@pytest.mark.parametrize("confined", [True, False])
async def test_a_file_beside_the_node_is_not_read(
    good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, confined: bool
) -> None:
    """Even without any check of the graph the engine can't read it; without the confinement too, it can."""
    secret = tmp_path / "work" / "secret.bin"
    secret.parent.mkdir()
    secret.write_bytes(b"SECRETS!")
    monkeypatch.chdir(secret.parent)
    spec = trial._spec("onnx", tmp_path)
    model = onnx.load_from_string(good)
    producer = next(n for n in model.graph.node if "hidden_states.0" in n.output)
    producer.output[list(producer.output).index("hidden_states.0")] = "plain"
    model.graph.node.extend(
        [
            constant(outside("secret.bin"), "read"),
            helper.make_node("Cast", ["read"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["numbers"], ["sum"], keepdims=0),
            helper.make_node("Add", ["plain", "sum"], ["hidden_states.0"]),
        ]
    )
    spec.graph.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="in a file; only initializers"):
        open_graph(spec.graph).model()
    off = "from meshnode.engine import cut, graph_check, graph_file\n"
    off += "cut.check_graph = graph_file.check_graph = lambda model, **_: None\n"
    if not confined:
        off += "from meshnode.engine import enclosed\nfrom meshnode.core.confinement.confine import Held\n"
        off += "enclosed.libraries_only = lambda: None\n"
        off += "enclosed.confine = lambda **_: Held((), 0, False)\n"
    (tmp_path / "sitecustomize.py").write_text(off)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    engine = EngineProcess(spec)
    with trio.fail_after(60):
        if confined:
            with pytest.raises(ModelError, match=r"ONNX Runtime .* can't open layers?"):
                await engine.start()
        else:
            await engine.start()
            await engine.stop()
