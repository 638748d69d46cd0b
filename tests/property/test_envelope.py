from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.envelope import open_record, sign_record
from protocols.errors import RemoteProtocolError
from tests.adverts import key_of, peer_of
from tests.hostile import mutated

domains = st.text(st.characters(exclude_categories=["Cs"]), max_size=64)


@settings(max_examples=100)
@given(domains, st.binary(max_size=200), st.integers(1, 5))
def test_any_record_comes_back(domain: str, payload: bytes, number: int) -> None:
    opened = open_record(sign_record(key_of(number), domain, payload), domain=domain)
    assert (opened.domain, opened.signer, opened.payload) == (domain, peer_of(number), payload)


RECORD = sign_record(key_of(1), "advert", b"payload")


@settings(max_examples=300)
@given(mutated(st.just(RECORD)) | st.binary(max_size=200))
def test_no_other_bytes_are_believed(data: bytes) -> None:
    if data != RECORD:
        with pytest.raises(RemoteProtocolError):
            open_record(data)
