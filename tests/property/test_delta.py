"""Any vector is sent with bounded errors; damaged bytes are refused or are another delta; histories agree."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.delta.codec import largest_payload, pack_delta, unpack_delta
from protocols.delta.frame import (
    ALTERNATING,
    FACTORS,
    MAX_PARAMETERS,
    TARGETS,
    Frame,
    Target,
    decode_frame,
    encode_frame,
)
from protocols.delta.lineage import Lineage
from protocols.delta.messages import Codec, contradiction, open_delta, record_cid
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, cid_of
from tests.deltas import FRAME, record, signed

CODECS = st.sampled_from(Codec)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    names = draw(st.sets(st.sampled_from(TARGETS), min_size=1))
    widths = st.integers(1, 64)
    first = draw(st.integers(0, 20))
    factors = draw(st.sampled_from(FACTORS))
    return Frame(
        base=cid_of(DAG_CBOR, draw(st.binary(max_size=4))),
        rank=draw(st.integers(1, 8)),
        alpha=draw(st.integers(1, 64)),
        targets=tuple(Target(name, draw(widths), draw(widths)) for name in sorted(names, key=TARGETS.index)),
        first=first,
        last=draw(st.integers(first + 1, first + 3)),
        seed=draw(st.integers(0, (1 << 63) - 1)),
        factors=factors,
        period=draw(st.integers(1, 9)) if factors == ALTERNATING else 1,
    )


@given(frames())
def test_any_frame(frame: Frame) -> None:
    data = encode_frame(frame)
    assert decode_frame(data) == frame
    start = frame.initial()
    assert start.size == frame.parameters == sum(a * b for _, (a, b) in frame.tensors) <= MAX_PARAMETERS
    assert set(frame.split(start)) == {name for name, _ in frame.tensors}
    other = dataclasses.replace(frame, rank=frame.rank + 1)
    assert other.cid != frame.cid


@settings(max_examples=200)
@given(CODECS, st.integers(1, 9000), st.integers(0, 1 << 32), st.floats(1e-6, 1e3))
def test_any_vector(codec: Codec, count: int, seed: int, scale: float) -> None:
    vector = (np.random.default_rng(seed).standard_t(3, count) * scale).clip(-6e4, 6e4).astype(np.float32)
    packed = pack_delta(codec, vector)
    assert len(packed.payload) <= largest_payload(codec, count)
    read = unpack_delta(packed.payload, codec=codec, parameters=count)
    assert (read == packed.sent).all()
    if codec is not Codec.SPARSE:
        steps = {Codec.INT8: 127, Codec.INT4: 7}[codec]
        blocks = np.zeros(-(-count // 64) * 64)
        blocks[:count] = vector
        largest = np.abs(blocks.reshape(-1, 64)).max(axis=1).repeat(64)[:count]
        assert (np.abs(read - vector) <= largest * 0.5011 / steps + 6e-8).all()


@settings(max_examples=300)
@given(CODECS, st.integers(1, 5000), st.data())
def test_damaged_bytes(codec: Codec, count: int, data: st.DataObject) -> None:
    payload = bytearray(pack_delta(codec, np.linspace(-1, 1, count, dtype=np.float32)).payload)
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    del payload[data.draw(st.integers(0, len(payload))) :]
    try:
        vector = unpack_delta(bytes(payload), codec=codec, parameters=count)
    except RemoteProtocolError:
        return
    assert vector.shape == (count,)
    assert np.isfinite(vector).all()


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    for read in (decode_frame, open_delta, lambda one: unpack_delta(one, codec=Codec.INT8, parameters=9)):
        try:
            read(data)
        except RemoteProtocolError:
            continue
        raise AssertionError("random bytes were taken")


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from(("ann", "bob", "eve")), st.integers(0, 12), st.booleans()), max_size=20),
    st.randoms(),
)
def test_histories_agree_in_any_order(made: list[tuple[str, int, bool]], chance: random.Random) -> None:
    """The same records, in any order and any number of times: the same history and the same liars."""
    records = []
    for name, number, lies in made:
        parents = [record_cid(data) for data in records[-2:]]
        said = record(name, number).made
        fields = {"made": dataclasses.replace(said, size=said.size, cid=said.cid[:-1] + b"\0")} if lies else {}
        records.append(signed(name, number, parents=parents, recent=8, **fields))
    one, other = Lineage(FRAME.cid), Lineage(FRAME.cid)
    shuffled = records * 2
    chance.shuffle(shuffled)
    for lineage, order in ((one, records), (other, shuffled)):
        for data in order:
            lineage.add(data, open_delta(data))
    assert one.heads == other.heads
    assert all(one.ancestors(record_cid(data)) == other.ancestors(record_cid(data)) for data in records)
    opened = [open_delta(data) for data in records]
    liars = {a.peer for a in opened for b in opened if contradiction(a, b) is not None}
    assert set(one.proofs) == set(other.proofs) == liars
