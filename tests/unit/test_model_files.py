"""Model files that are damaged or made up: the publisher refuses them with a sentence."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from meshnode.core.errors import ModelError

pytest.importorskip("gguf")
pytest.importorskip("torch")

from meshnode.publisher.checkpoint import FolderCheckpoint, GgufCheckpoint
from meshnode.publisher.gguf import GgufFile
from tests.fuzz.targets import gguf_files, safetensors_file


def gguf_file(path: Path, tensors: int, entries: int, rest: bytes) -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest)
    return path


def test_arrays_inside_of_arrays_without_end(tmp_path: Path) -> None:
    value = struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
    with pytest.raises(ModelError, match="arrays inside of arrays"):
        GgufFile(gguf_file(tmp_path / "deep.gguf", 0, 1, value))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (33,)], ids=str)
def test_a_tensor_whose_shape_is_impossible(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Of q8_0, whose blocks have 32 values."""
    tensor = struct.pack("<Q", 1) + b"t" + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 8, 0)
    with pytest.raises(ModelError, match="damaged"):
        GgufFile(gguf_file(tmp_path / "odd.gguf", 1, 0, tensor + bytes(256))).read("t")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", 3),
        ("llama.embedding_length", 0),
        ("llama.attention.head_count", 1 << 31),
        ("token_embd.weight", 1),
    ],
)
def test_a_model_that_cannot_be(key: str, value: int, tmp_path: Path) -> None:
    """The value, or the number of dimensions, is the second or the first number after the key."""
    data = gguf_files()[0]
    end = data.index(key.encode()) + len(key) + (0 if key.startswith("token") else 4)
    (tmp_path / "odd.gguf").write_bytes(data[:end] + struct.pack("<I", value) + data[end + 4 :])
    with pytest.raises(ModelError):
        GgufCheckpoint(tmp_path / "odd.gguf")


def folder_of(folder: Path, **files: Any) -> Path:
    (folder / "model.safetensors").write_bytes(safetensors_file({"b": (3,)}))
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    for name, content in {"config": {"model_type": "llama"}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "listed", [3, [], "x", {"b": 3}, {"b": {}}, {"b": "a/b"}, {"b": "x" * 4000}, {"b": "\0"}], ids=str
)
def test_a_list_of_weights_that_names_no_files(listed: object, tmp_path: Path) -> None:
    index = {"weight_map": listed}
    with pytest.raises(ModelError, match=r"index\.json names"):
        FolderCheckpoint(folder_of(tmp_path, **{"model.safetensors.index": index}))


def test_chat_templates_with_names_that_are_none(tmp_path: Path) -> None:
    templates = [{"name": ["x"], "template": "a"}, {"name": "default", "template": "b"}, 3]
    found = FolderCheckpoint(folder_of(tmp_path, tokenizer_config={"chat_template": templates}))
    assert found.tokenizer()[1] == "b"
