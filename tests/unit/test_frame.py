from __future__ import annotations

import pytest

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.frame import MAX_BODY_BYTES, MAX_HEADER_BYTES, PREFIX_BYTES, Frame, FrameReader, pack


def test_the_layout_is_two_lengths_header_body() -> None:
    assert pack(b"ab", b"xyz") == bytes.fromhex("00000002 00000003") + b"abxyz"
    assert list(FrameReader().feed(pack(b"") + pack(b"", b"x"))) == [Frame(b"", b""), Frame(b"", b"x")]


def test_an_unfinished_frame_is_pending() -> None:
    reader = FrameReader()
    data = pack(b"head", b"body")
    for end in range(len(data)):
        assert list(reader.feed(data[end : end + 1])) == ([Frame(b"head", b"body")] if end == len(data) - 1 else [])
        assert reader.pending == (end + 1) % len(data)


def test_bytes_are_taken_even_if_nobody_looks_at_the_frames() -> None:
    reader = FrameReader()
    reader.feed(pack(b"1") + pack(b"2"))
    first = next(iter(reader.feed(pack(b"3"))))
    assert [first, *reader.feed(pack(b"4"))] == [Frame(b"1"), Frame(b"2"), Frame(b"3"), Frame(b"4")]
    assert reader.pending == 0


def test_good_frames_before_a_bad_one_are_given_and_the_error_stays() -> None:
    reader = FrameReader(max_header=4, max_body=8)
    frames = reader.feed(pack(b"good", b"12345678") + bytes.fromhex("00000005 00000000"))
    assert next(frames) == Frame(b"good", b"12345678")
    for again in (frames, reader.feed(b"")):
        with pytest.raises(RemoteProtocolError, match=r"5 \+ 0 bytes; the limits are 4 \+ 8"):
            next(again)


@pytest.mark.parametrize("prefix", ["ffffffff00000000", "00000000ffffffff", "0004000100000000", "0000000004000001"])
def test_a_length_above_the_limit_is_refused_before_its_bytes_come(prefix: str) -> None:
    with pytest.raises(RemoteProtocolError, match="limits"):
        list(FrameReader().feed(bytes.fromhex(prefix)))


def test_our_own_frames_have_the_same_limits() -> None:
    assert len(pack(bytes(MAX_HEADER_BYTES))) == PREFIX_BYTES + MAX_HEADER_BYTES
    with pytest.raises(LocalProtocolError, match="limits"):
        pack(bytes(MAX_HEADER_BYTES + 1))
    with pytest.raises(LocalProtocolError, match="limits"):
        pack(b"", memoryview(bytearray(MAX_BODY_BYTES + 1)))


def test_the_length_of_a_body_is_counted_in_bytes() -> None:
    floats = memoryview(bytearray(8)).cast("f")
    assert list(FrameReader().feed(pack(b"", floats))) == [Frame(b"", bytes(8))]
