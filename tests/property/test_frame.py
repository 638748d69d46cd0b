from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import RemoteProtocolError
from protocols.frame import Frame, FrameReader

frames = st.lists(st.builds(Frame, st.binary(max_size=40), st.binary(max_size=80)), max_size=6)


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
