"""Frames: their block, their tensors, their start."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from protocols.dag_cbor import dumps, link_to_wire
from protocols.delta.frame import Frame, Target, decode_frame, encode_frame
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import DAG_CBOR, RAW, cid_of

BASE = cid_of(DAG_CBOR, b"a manifest")
FRAME = Frame(
    base=BASE,
    rank=2,
    alpha=4,
    targets=(Target("q_proj", 6, 6), Target("v_proj", 6, 3)),
    first=1,
    last=3,
    seed=7,
)
WIDE = {"name": "q_proj", "inputs": 999, "outputs": 1}
WIRE: dict[str, Any] = {
    "schema": 1,
    "base": link_to_wire(BASE),
    "rank": 2,
    "alpha": 4,
    "targets": [{"name": "q_proj", "inputs": 6, "outputs": 6}, {"name": "v_proj", "inputs": 6, "outputs": 3}],
    "first": 1,
    "last": 3,
    "seed": 7,
    "factors": "both",
    "period": 1,
}


def test_a_frame_is_its_block() -> None:
    assert encode_frame(FRAME) == dumps(WIRE)
    assert decode_frame(dumps(WIRE)) == FRAME
    assert FRAME.cid == cid_of(DAG_CBOR, dumps(WIRE))
    assert FRAME.cid == "bafyreianawvwanijmwuzufd6rwbtr5anh43ftboem6b2f3fsih6yb5qwbm"  # others compute it, too
    assert FRAME.scale == 2.0


def test_the_tensors_lie_one_behind_another() -> None:
    assert FRAME.tensors == (
        ("layers.1.q_proj.A", (2, 6)),
        ("layers.1.q_proj.B", (6, 2)),
        ("layers.1.v_proj.A", (2, 6)),
        ("layers.1.v_proj.B", (3, 2)),
        ("layers.2.q_proj.A", (2, 6)),
        ("layers.2.q_proj.B", (6, 2)),
        ("layers.2.v_proj.A", (2, 6)),
        ("layers.2.v_proj.B", (3, 2)),
    )
    assert FRAME.parameters == 2 * (12 + 12 + 12 + 6)
    vector = np.arange(FRAME.parameters, dtype=np.float32)
    parts = FRAME.split(vector)
    assert np.concatenate([part.reshape(-1) for part in parts.values()]).tolist() == vector.tolist()
    parts["layers.2.v_proj.B"][2, 1] = -1
    assert vector[-1] == -1


def test_the_start_changes_nothing_and_is_the_same_everywhere() -> None:
    vector = FRAME.initial()
    numbers = np.random.Generator(np.random.PCG64(7))
    for name, tensor in FRAME.split(vector).items():
        if name.endswith(".B"):
            assert not tensor.any()
        else:
            expected = (2 * numbers.random(tensor.shape) - 1) / np.sqrt(6)
            assert (tensor == expected.astype(np.float32)).all()
    assert vector[:2].tolist() == pytest.approx([0.10214002, 0.32432371], abs=1e-7)
    assert (dataclasses.replace(FRAME, seed=8).initial() != vector).any()


def test_a_vector_of_another_shape_is_not_split() -> None:
    for wrong in (np.zeros(3, np.float32), np.zeros(FRAME.parameters), np.zeros((FRAME.parameters, 1), np.float32)):
        with pytest.raises(LocalProtocolError, match="84 float32"):
            FRAME.split(wrong)  # type: ignore[arg-type]


def test_which_factors_are_trained_when() -> None:
    turns = dataclasses.replace(FRAME, factors="alternating", period=2)
    assert [turns.trained(number) for number in range(1, 7)] == [("B",), ("B",), ("A",), ("A",), ("B",), ("B",)]
    assert FRAME.trained(5) == ("A", "B")
    assert dataclasses.replace(FRAME, factors="b").trained(1) == ("B",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "schema 2; this node reads schema 1"),
        ({"base": "bafy"}, "not a link"),
        ({"base": link_to_wire(cid_of(RAW, b"x"))}, "not the CID of a manifest"),
        ({"rank": 0}, "rank is 0, allowed are 1 to 256"),
        ({"rank": 2.0}, "type float"),
        ({"alpha": True}, "alpha is True"),
        ({"first": 3}, "last is 3, allowed are 4 to"),
        ({"last": 1025}, "last is 1025"),
        ({"seed": 1 << 63}, "seed is"),
        ({"factors": "a"}, "allowed are both, alternating, b"),
        ({"factors": ["b"]}, "allowed are both, alternating, b"),
        ({"period": 5}, "only alternating factors have one"),
        ({"targets": []}, "array of 1 to 7"),
        ({"targets": WIRE["targets"][::-1]}, "twice or out of order"),
        ({"targets": WIRE["targets"][:1] * 2}, "twice or out of order"),
        ({"targets": [{"name": "lm_head", "inputs": 6, "outputs": 6}]}, "named 'lm_head'"),
        ({"targets": [{"name": "q_proj", "inputs": 0, "outputs": 6}]}, "q_proj.inputs is 0"),
        ({"targets": [{"name": "q_proj", "inputs": 6}]}, "lacks or has too much: outputs"),
        ({"rank": 256, "last": 999, "targets": [WIDE]}, "limit is 67108864"),
        ({"more": 1}, "lacks or has too much: more"),
    ],
)  # fmt: skip
def test_what_no_frame_may_say(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        decode_frame(dumps({**WIRE, **change}))


def test_our_own_mistakes_are_ours() -> None:
    with pytest.raises(LocalProtocolError, match="A frame can't be written: rank is 0"):
        encode_frame(dataclasses.replace(FRAME, rank=0))
    with pytest.raises(RemoteProtocolError, match="the limit is 4096"):
        decode_frame(bytes(4097))
