"""Adapters as files: back and forth, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from meshnode.core.errors import ModelError
from meshnode.model.adapter import adapter_vector, build_adapter
from meshnode.model.adapter_file import Pair, read_layer, write_layer
from meshnode.model.adapter_fit import check_adapter, check_sizes, most_bytes
from protocols.adapter.manifest import AdapterManifest, decode_adapter
from protocols.delta.frame import Frame, Target, decode_frame
from protocols.ids import DAG_CBOR, RAW, cid_of
from protocols.manifest.messages import Architecture, FileRef
from tests.adapters import Shelf

FRAME = Frame(
    base=cid_of(DAG_CBOR, b"a release"),
    rank=3,
    alpha=4,
    targets=(Target("q_proj", 6, 8), Target("down_proj", 10, 6)),
    first=1,
    last=4,
    seed=5,
)
RNG = np.random.default_rng(11)
VECTOR = RNG.standard_normal(FRAME.parameters).astype(np.float32)


def pairs() -> dict[str, Pair]:
    return {
        "q_proj": Pair(RNG.standard_normal((3, 6), np.float32), RNG.standard_normal((8, 3), np.float32)),
        "down_proj": Pair(RNG.standard_normal((3, 10), np.float32), RNG.standard_normal((6, 3), np.float32)),
    }


@pytest.mark.parametrize("half", [False, True])
def test_a_vector_is_served_and_comes_back(half: bool) -> None:
    shelf = Shelf()
    cid = build_adapter(FRAME, VECTOR, shelf, version=7, pin="mine", half=half)
    manifest = decode_adapter(shelf.held[cid])
    assert (manifest.base, manifest.version, manifest.first, manifest.last) == (FRAME.base, 7, 1, 4)
    assert shelf.pinned.keys() == shelf.held.keys(), "what is not pinned may be evicted"
    frame = decode_frame(shelf.held[manifest.frame])
    assert frame == FRAME
    back = adapter_vector(frame, manifest, shelf.read)
    np.testing.assert_array_equal(back, VECTOR.astype(np.float16).astype(np.float32) if half else VECTOR)
    assert build_adapter(FRAME, VECTOR, Shelf(), version=7, pin="other", half=half) == cid


def test_the_files_are_safetensors() -> None:
    given = pairs()
    theirs = safetensors.numpy.load(write_layer(given))
    assert theirs.keys() == {"q_proj.A", "q_proj.B", "down_proj.A", "down_proj.B"}
    np.testing.assert_array_equal(theirs["down_proj.B"], given["down_proj"].b)
    ours = read_layer(safetensors.numpy.save(theirs), 3)
    for target, pair in given.items():
        np.testing.assert_array_equal(ours[target].a, pair.a)
        np.testing.assert_array_equal(ours[target].b, pair.b)


def test_a_file_is_no_larger_than_its_shapes_say() -> None:
    assert len(write_layer(pairs())) <= most_bytes(3, {"q_proj": (6, 8), "down_proj": (10, 6)})


def header(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A file whose header says something else."""
    data = write_layer(pairs())
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def renamed(old: str, new: str) -> bytes:
    def change(entries: dict[str, Any]) -> None:
        again = {new if name == old else name: entry for name, entry in entries.items()}
        entries.clear()
        entries.update(again)

    return header(change)


def broken(value: float) -> bytes:
    given = pairs()
    good = write_layer(given)
    return good[:-4] + np.float32(value).tobytes()


REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no safetensors file"),
    "a header that is too long": ((1 << 40).to_bytes(8, "little") + bytes(64), "no safetensors file"),
    "a header that is no JSON": ((8).to_bytes(8, "little") + b"{{{{{{{{", "no JSON"),
    "a header that is deep": ((4000).to_bytes(8, "little") + b"[" * 4000, "no JSON"),
    "a header that is a list": ((8).to_bytes(8, "little") + b"[1, 2]  ", "describes no tensors"),
    "no tensors": ((8).to_bytes(8, "little") + b"{}      ", "no factors"),
    "cut off": (write_layer(pairs())[:-1], "does not lie where"),
    "something behind it": (write_layer(pairs()) + b"\0", "1 bytes follow"),
    "not a number": (broken(float("nan")), "down_proj.B has values that are no numbers"),
    "infinite": (broken(float("-inf")), "down_proj.B has values that are no numbers"),
    "one factor": (renamed("down_proj.A", "up_proj.A"), "only its factor"),
    "a foreign tensor": (renamed("q_proj.A", "embed.weight"), "embed.weight"),
    "metadata": (header(lambda h: h.update({"__metadata__": {}})), "__metadata__"),
    "another type": (header(lambda h: h["q_proj.A"].update(dtype="BF16")), "not float32 or float16"),
    "a type that is no text": (header(lambda h: h["q_proj.A"].update(dtype=[])), "not float32 or float16"),
    "another rank": (header(lambda h: h["q_proj.A"].update(shape=[6, 3])), "which is not of rank 3"),
    "one dimension": (header(lambda h: h["q_proj.A"].update(shape=[18])), "has a shape"),
    "a huge shape": (header(lambda h: h["q_proj.A"].update(shape=[3, 1 << 30])), "has a shape"),
    "a shape with a bool": (header(lambda h: h["q_proj.A"].update(shape=[3, True])), "has a shape"),
    "an offset elsewhere": (header(lambda h: h["q_proj.A"].update(data_offsets=[4, 76])), "does not lie where"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_files(case: str) -> None:
    content, words = REFUSED[case]
    with pytest.raises(ModelError, match=words):
        read_layer(content, 3)


def test_what_can_not_be_written() -> None:
    for value, half in ((np.nan, False), (1e6, True)):
        vector = VECTOR.copy()
        vector[3] = value
        with pytest.raises(ModelError, match="can't hold"):
            build_adapter(FRAME, vector, Shelf(), version=0, pin="p", half=half)
    big = Frame(base=FRAME.base, rank=65, alpha=1, targets=(Target("q_proj", 1, 1),), first=0, last=1, seed=0)
    with pytest.raises(ModelError, match="65 is not served"):
        build_adapter(big, np.zeros(big.parameters, np.float32), Shelf(), version=0, pin="p")


def changed(frame: Frame, **more: Any) -> Frame:
    fields = {name: getattr(frame, name) for name in ("base", "rank", "alpha", "targets", "first", "last", "seed")}
    return Frame(**{**fields, **more})


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (changed(FRAME, base=cid_of(DAG_CBOR, b"another release")), "one release as its base"),
        (changed(FRAME, first=0), "files for the layers 1 to 3, its frame is of 0 to 3"),
        (changed(FRAME, rank=65), "up to rank 64"),
        (changed(FRAME, rank=1, targets=(Target("q_proj", 6, 8),)), "has .* at most"),
    ],
)
def test_a_manifest_that_does_not_fit_its_frame(frame: Frame, words: str) -> None:
    files = tuple(FileRef(cid=cid_of(RAW, bytes([k])), size=5000) for k in range(3))
    manifest = AdapterManifest(base=FRAME.base, frame=frame.cid, version=0, first=1, layers=files)
    with pytest.raises(ModelError, match=words):
        check_adapter(manifest, frame)


def test_files_that_do_not_fit_the_frame() -> None:
    shelf = Shelf()
    manifest = decode_adapter(shelf.held[build_adapter(FRAME, VECTOR, shelf, version=0, pin="p")])
    for targets, words in (
        ((Target("q_proj", 6, 8), Target("v_proj", 10, 6)), "layer 1 .* no v_proj"),
        ((Target("q_proj", 6, 8),), "down_proj, which the frame does not have"),
        ((Target("q_proj", 8, 6), Target("down_proj", 10, 6)), "q_proj has other sizes"),
    ):
        with pytest.raises(ModelError, match=words):
            adapter_vector(changed(FRAME, targets=targets), manifest, shelf.read)


SHAPE = Architecture(
    family="llama",
    layers=4,
    hidden=6,
    heads=4,
    kv_heads=2,
    head_dim=2,
    vocab=10,
    context=10,
    bos_ids=(),
    eos_ids=(),
)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (changed(FRAME, last=5), "for the layers 1 to 4; the model has 4"),
        (changed(FRAME, targets=(Target("q_proj", 6, 6),)), "takes q_proj for 6 inputs and 6 outputs; .* 6 and 8"),
        (changed(FRAME, targets=(Target("v_proj", 6, 8),)), "6 and 4"),
        (changed(FRAME, targets=(Target("o_proj", 6, 6),)), "8 and 6"),
        (changed(FRAME, targets=(Target("down_proj", 10, 8),)), "10 and 6"),
        (changed(FRAME, targets=(Target("gate_proj", 6, 12), Target("up_proj", 6, 13))), "up_proj .* 6 and 12"),
    ],
)
def test_sizes_that_the_model_does_not_have(frame: Frame, words: str) -> None:
    check_sizes(FRAME, SHAPE)
    with pytest.raises(ModelError, match=words):
        check_sizes(frame, SHAPE)
