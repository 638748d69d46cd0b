from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.envelope import open_record, sign_record
from protocols.errors import RemoteProtocolError
from tests.adverts import key_of, peer_of

domains = st.text(st.characters(exclude_categories=["Cs"]), max_size=64)


@settings(max_examples=100)
@given(domains, st.binary(max_size=200), st.integers(1, 5))
def test_any_record_comes_back(domain: str, payload: bytes, number: int) -> None:
    opened = open_record(sign_record(key_of(number), domain, payload), domain=domain)
    assert (opened.domain, opened.signer, opened.payload) == (domain, peer_of(number), payload)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_record(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        open_record(data)
        raise AssertionError("a random signature holds")


@settings(max_examples=100)
@given(st.binary(max_size=40), st.data())
def test_two_flipped_bytes_are_noticed(payload: bytes, data: st.DataObject) -> None:
    record = bytearray(sign_record(key_of(1), "advert", payload))
    for _ in range(2):
        record[data.draw(st.integers(0, len(record) - 1))] ^= data.draw(st.integers(1, 255))
    if bytes(record) != sign_record(key_of(1), "advert", payload):
        with contextlib.suppress(RemoteProtocolError):
            open_record(bytes(record))
            raise AssertionError("a damaged record is believed")
