"""enginewire: round trips, and bytes from outside never do more than a RemoteProtocolError."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.enginewire.messages import ANSWERS, REQUESTS, Answer, Request
from tests.wire import messages, survives

requests = st.one_of([messages(cls) for cls in REQUESTS])
answers = st.one_of([messages(cls) for cls in ANSWERS])


@settings(max_examples=100)
@given(message=requests)
def test_requests_come_back(message: Request) -> None:
    assert REQUESTS.decode(REQUESTS.encode(message)) == message


@settings(max_examples=100)
@given(message=answers)
def test_answers_come_back(message: Answer) -> None:
    assert ANSWERS.decode(ANSWERS.encode(message)) == message


@settings(max_examples=200)
@given(data=st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    survives(data, REQUESTS.decode, REQUESTS.encode)
    survives(data, ANSWERS.decode, ANSWERS.encode)
