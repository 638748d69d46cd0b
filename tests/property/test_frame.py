from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import RemoteProtocolError
from protocols.frame import Frame, FrameReader, pack

frames = st.lists(st.builds(Frame, st.binary(max_size=40), st.binary(max_size=80)), max_size=6)


@settings(max_examples=200)
@given(frames, st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_any_cut_of_the_stream_gives_the_same_frames(sent: list[Frame], cuts: list[int]) -> None:
    data = b"".join(pack(f.header, f.body) for f in sent)
    reader = FrameReader()
    got: list[Frame] = []
    at = turn = 0
    while at < len(data):
        size = cuts[turn % len(cuts)]
        got += reader.feed(data[at : at + size])
        at, turn = at + size, turn + 1
    assert got == sent
    assert reader.pending == 0


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=40), max_size=8))
def test_random_bytes_are_frames_or_refused_and_never_pile_up(pieces: list[bytes]) -> None:
    reader = FrameReader(max_header=32, max_body=64)
    try:
        for piece in pieces:
            for frame in reader.feed(piece):
                assert len(frame.header) <= 32
                assert len(frame.body) <= 64
            assert reader.pending < 8 + 32 + 64
    except RemoteProtocolError:
        pass
