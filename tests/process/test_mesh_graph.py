"""Real nodes and a published graph that wants a file: they say which node of it, and go on with an honest model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from meshnode.core.errors import Declined
from meshnode.engine import trial
from meshnode.engine.graph_file import pack_graph
from meshnode.harness.mesh import Mesh
from meshnode.text.question import Question
from tests.process.mesh_rig import NO_COPIES, mesh_of, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process]

ONNX = (("serve.engine", "onnx"), *NO_COPIES)


def release(folder: Path, model: onnx.ModelProto, weights: bytes, name: str) -> Path:
    """A folder as the publisher writes it, of the trial model: its head names the token after the last one."""
    folder.mkdir(parents=True)
    spec = trial._spec("null", folder)

    def write(file: str, data: bytes) -> dict[str, object]:
        (folder / file).write_bytes(data)
        return {"path": file, "size": len(data)}

    vocabulary = {f"w{i}": i for i in range(trial.VOCABULARY)}
    words = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": words,
    }
    shape = spec.architecture
    architecture = {
        key: getattr(shape, key) for key in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab")
    }
    index = {
        "name": name,
        "architecture": {**architecture, "family": "llama", "context": shape.context, "bos_ids": [], "eos_ids": []},
        "files": {"tokenizer.json": write("tokenizer.json", json.dumps(tokenizer).encode())},
        "variants": {
            "int4": {
                "kernel_class": "ort-cpu-int4-b32-a4/1",
                "graph": write("graph", pack_graph(model)),
                "embed": write("embed", weights),
                "layers": [write("layer.0", weights + b"0")],
                "head": write("head", weights + b"1"),
            }
        },
    }
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def trial_model(folder: Path) -> tuple[onnx.ModelProto, bytes]:
    folder.mkdir()
    trial._write_model(folder / "graph", folder / "weights")
    content = (folder / "graph").read_bytes()
    return onnx.load_from_string(content), (folder / "weights").read_bytes()


def add_reading(model: onnx.ModelProto, location: str) -> None:
    """The logits are added to what a file holds."""
    outside = TensorProto(dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        outside.external_data.add(key=key, value=value)
    producer = next(node for node in model.graph.node if "logits" in node.output)
    producer.output[0] = "own"
    reading = helper.make_node("Constant", [], ["outside"], name="reading", value=outside)
    model.graph.node.extend([reading, helper.make_node("Add", ["own", "outside"], ["logits"])])


def complaint(mesh: Mesh) -> str:
    """What the node says about a span that it can't open."""
    member = mesh.members[0]
    with pytest.raises(Declined):
        member.client.wait_ready(15)
    (entry,) = [entry for entry in member.client.status().health if entry.code == "model-unusable"]
    return entry.text


@pytest.mark.long
def test_a_node_refuses_the_graph_and_serves_another(tmp_path: Path) -> None:
    model, weights = trial_model(tmp_path / "trial")
    bad = onnx.ModelProto()
    bad.CopyFrom(model)
    add_reading(bad, "node.key")
    with mesh_of(
        tmp_path / "bad", 1, published=release(tmp_path / "bad-model", bad, weights, "bad"), wait=False, settings=ONNX
    ) as mesh:
        said = complaint(mesh)
    assert re.search(
        r"The graph baf\w{50,} is not run: the node 'reading' \('Constant'\): the attribute 'value'", said
    )
    assert "Serve another model" in said
    with mesh_of(
        tmp_path / "good", 1, published=release(tmp_path / "good-model", model, weights, "good"), settings=ONNX
    ) as mesh:
        question = Question(token_ids=(3, 1, 4), max_tokens=4, temperature=0)
        assert tokens_of(mesh.members[0], question) == [5, 6, 7, 8]
