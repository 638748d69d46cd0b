"""The bytes of deltas: errors of each form, sizes, refusals, what is left over for the next one."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard

from protocols.delta.codec import largest_payload, pack_delta, unpack_delta
from protocols.delta.frame import Vector
from protocols.delta.messages import HEADER_BYTES, Codec
from protocols.errors import LocalProtocolError, RemoteProtocolError
from tests.conftest import SEED


def heavy(count: int) -> Vector:
    """Student's t with three degrees of freedom: outliers as in real deltas."""
    return (np.random.default_rng(SEED).standard_t(3, count) * 0.01).astype(np.float32)


def error(codec: Codec, values: Vector) -> float:
    packed = pack_delta(codec, values)
    return float(np.linalg.norm(packed.sent - values) / np.linalg.norm(values))


@pytest.mark.parametrize("count", [1, 2, 49, 63, 64, 65, 4095, 4096, 4097, 12_345])
@pytest.mark.parametrize("codec", Codec)
def test_what_is_sent_is_what_is_read(codec: Codec, count: int) -> None:
    values = heavy(count)
    packed = pack_delta(codec, values)
    assert (unpack_delta(packed.payload, codec=codec, parameters=count) == packed.sent).all()
    assert len(packed.payload) <= largest_payload(codec, count)
    assert packed.residual == pytest.approx(codec.kept * (values - packed.sent), abs=1e-9)


def test_errors_stay_within_what_was_measured() -> None:
    """E5.1 of the literature notes: int8 in blocks of 64 at most 0.012 on heavy tails, int4 at most 0.20."""
    values = heavy(1 << 18)
    assert error(Codec.INT8, values) <= 0.012
    assert error(Codec.INT4, values) <= 0.20


def test_sizes() -> None:
    """Against float32, without what zstd gains."""
    count = 460_800
    assert 4 * count / largest_payload(Codec.INT8, count) > 3.8
    assert 4 * count / largest_payload(Codec.INT4, count) > 7.5
    assert 4 * count / largest_payload(Codec.SPARSE, count) > 155


def test_sparse_takes_the_largest_of_every_chunk() -> None:
    values = np.full(4096, 0.001, np.float32)
    values[[5, 77, 4095]] = 3.0, -4.0, 5.0
    sent = pack_delta(Codec.SPARSE, values).sent
    assert np.count_nonzero(sent) == 82
    assert (np.sign(sent[[5, 77, 4095]]) == (1, -1, 1)).all()
    assert sent[5] == pytest.approx(4.0, rel=1e-3)  # one magnitude for all that are above the median
    assert np.abs(np.delete(sent, [5, 77, 4095])).max() == pytest.approx(0.001, rel=1e-3)


def test_what_is_left_over_comes_with_the_next() -> None:
    """Without it the same 82 of 4096 places would be sent for ever."""
    change = np.abs(heavy(4096)) + np.float32(0.01)
    reached, residual = np.zeros(4096, bool), None
    for _ in range(200):
        packed = pack_delta(Codec.SPARSE, change, residual)
        reached, residual = reached | (packed.sent > 0), packed.residual
    assert reached.sum() > 20 * 82
    exact, residual = np.zeros(4096, np.float32), None
    for _ in range(20):
        packed = pack_delta(Codec.INT4, change, residual)
        exact, residual = exact + packed.sent, packed.residual
    assert exact + residual == pytest.approx(20 * change, rel=1e-4)


def test_zeros_are_compressed() -> None:
    """Half of a delta is zero when factors alternate."""
    values = heavy(65_536)
    values[::2] = 0
    values[: 1 << 15] = 0
    payload = pack_delta(Codec.INT8, values).payload
    assert payload[6] == 1
    assert len(payload) < 0.6 * largest_payload(Codec.INT8, values.size)
    noise = np.random.default_rng(SEED).uniform(-1, 1, 4096).astype(np.float32)
    assert pack_delta(Codec.INT8, noise).payload[6] == 0


@pytest.mark.parametrize("codec", Codec)
def test_tiny_and_huge_values(codec: Codec) -> None:
    for scale in (1e-30, 1e-8, 6e-8, 6e4):
        values = np.full(100, scale, np.float32)
        sent = pack_delta(codec, values).sent
        assert np.isfinite(sent).all()
        assert np.abs(sent).max() <= max(scale * 1.001, 2.0**-23)
    assert not pack_delta(codec, np.zeros(100, np.float32)).sent.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -70_000.0])
def test_a_diverged_adapter_is_not_sent(bad: float) -> None:
    values = heavy(100)
    values[50] = bad
    with pytest.raises(LocalProtocolError, match="diverged"):
        pack_delta(Codec.INT8, values)


def test_only_vectors_are_packed() -> None:
    for wrong in (np.zeros(4), np.zeros((2, 2), np.float32), np.zeros(0, np.float32)):
        with pytest.raises(LocalProtocolError, match="a vector of 1 to"):
            pack_delta(Codec.INT8, wrong)  # type: ignore[arg-type]


def refused(payload: bytes, words: str, codec: Codec = Codec.INT8, parameters: int = 100) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        unpack_delta(payload, codec=codec, parameters=parameters)


def plain(codec: Codec, body: bytes, count: int = 100) -> bytes:
    size = largest_payload(codec, count) - HEADER_BYTES
    return b"mdel" + bytes((1, codec, 0, 0)) + count.to_bytes(4, "big") + size.to_bytes(4, "big") + body


def pressed(data: bytes, declared: int = 104) -> bytes:
    return b"mdel\1\1\1\0" + (100).to_bytes(4, "big") + declared.to_bytes(4, "big") + data


def test_refused_headers() -> None:
    good = plain(Codec.INT8, bytes(104))
    unpack_delta(good, codec=Codec.INT8, parameters=100)
    refused(b"", "something else")
    refused(good[:15], "something else")
    refused(b"mdex" + good[4:], "something else")
    refused(b"mdel\2" + good[5:], "version 2.0; this node reads 1.0")
    refused(good[:7] + b"\1" + good[8:], "version 1.1")
    refused(good, "codec 1, but its record names 2", codec=Codec.INT4)
    refused(good, "100 values; adapters of its frame have 101", parameters=101)
    refused(good[:12] + b"\xff\xff\xff\xff" + good[16:], "body of 4294967295 bytes; 100 values take 104")
    refused(good[:6] + b"\2" + good[7:], "method 2")
    refused(good + b"\0", "105 bytes instead of 104")
    refused(good[:-1], "103 bytes instead of 104")


def test_refused_bodies() -> None:
    refused(plain(Codec.INT8, b"\0\x7c" + bytes(102)), "scale that is not finite")
    refused(plain(Codec.INT8, b"\0\xbc" + bytes(102)), "or negative")
    refused(plain(Codec.INT8, bytes(103) + b"\x80"), "code below -127")
    refused(plain(Codec.INT4, bytes(53) + b"\x08"), "code below -7", Codec.INT4)
    refused(plain(Codec.INT4, bytes(4 + 49) + b"\x10", 99), "bits behind", Codec.INT4, 99)
    # 100 values: 2 places; 4 bytes of magnitudes, 2 of low bits, 1 of the bitmap (6 bits), 1 of marks (4 bits)
    good = plain(Codec.SPARSE, bytes(4) + b"\x00\x40" + b"\xc0" + b"\0")  # places 0 and 1
    unpack_delta(good, codec=Codec.SPARSE, parameters=100)
    refused(plain(Codec.SPARSE, bytes(4) + b"\0\x40\x80\0"), "1 places instead of 2", Codec.SPARSE)
    refused(plain(Codec.SPARSE, bytes(4) + b"\0\0\xc0\0"), "not ascending", Codec.SPARSE)
    refused(plain(Codec.SPARSE, bytes(4) + b"\x03\xc0\x0c\0"), "outside of it", Codec.SPARSE)
    refused(plain(Codec.SPARSE, bytes(4) + b"\0\x41\xc0\0"), "bits behind", Codec.SPARSE)
    refused(plain(Codec.SPARSE, bytes(4) + b"\0\x40\xc1\0"), "bits behind", Codec.SPARSE)
    refused(plain(Codec.SPARSE, bytes(4) + b"\0\x40\xc0\1"), "bits behind", Codec.SPARSE)


def test_refused_compression() -> None:
    squeeze = zstandard.ZstdCompressor().compress
    unpack_delta(pressed(squeeze(bytes(104))), codec=Codec.INT8, parameters=100)
    refused(pressed(squeeze(bytes(1 << 20))), "unfolds to 1048576 bytes instead of 104")
    refused(pressed(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(104))), "instead of 104")
    refused(pressed(squeeze(bytes(104)) + b"\0"), "can't be decompressed")
    refused(pressed(squeeze(bytes(104))[:-1]), "can't be decompressed")
    refused(pressed(b"nonsense"), "can't be decompressed")
    refused(pressed(bytes(104)), "104 bytes compressed, and 104 plain")
