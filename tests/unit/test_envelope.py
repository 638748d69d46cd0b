from __future__ import annotations

import pytest

from protocols.codec import decode, dumps, encode
from protocols.envelope import MAX_RECORD_BYTES, open_record, sign_record
from protocols.envelope.record import SignedRecord
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import public_key_of
from tests.adverts import key_of, peer_of
from tests.vectors import Case, hold
from tests.wire import damaged

RECORD = sign_record(key_of(1), "advert", b"payload")


def test_a_record_comes_back_with_its_signer() -> None:
    opened = open_record(RECORD, domain="advert")
    assert (opened.domain, opened.signer, opened.payload) == ("advert", peer_of(1), b"payload")
    assert open_record(RECORD) == opened


def test_a_record_of_one_kind_is_none_of_another() -> None:
    with pytest.raises(RemoteProtocolError, match="'advert' where 'head'"):
        open_record(RECORD, domain="head")
    parts = decode(SignedRecord, RECORD)
    moved = SignedRecord(domain="head", signer=parts.signer, payload=parts.payload, signature=parts.signature)
    with pytest.raises(RemoteProtocolError, match=f"signature on a 'head' record of {peer_of(1)} is wrong"):
        open_record(encode(moved))


def test_the_end_of_the_domain_can_not_slide_into_the_payload() -> None:
    parts = decode(SignedRecord, sign_record(key_of(1), "ab", b"c"))
    slid = SignedRecord(domain="a", signer=parts.signer, payload=b"bc", signature=parts.signature)
    with pytest.raises(RemoteProtocolError, match="is wrong"):
        open_record(encode(slid))


def test_nobody_signs_for_another() -> None:
    parts = decode(SignedRecord, RECORD)
    forged = SignedRecord(
        domain=parts.domain, signer=public_key_of(peer_of(2)), payload=parts.payload, signature=parts.signature
    )
    with pytest.raises(RemoteProtocolError, match="is wrong"):
        open_record(encode(forged))


@pytest.mark.parametrize("signer", [bytes(32), b"\1" + bytes(31), b"\xff" * 32])
def test_weak_and_impossible_keys_are_refused(signer: bytes) -> None:
    # With a key of small order, a signature of zeros could hold for any message.
    for signature in (bytes(64), b"\1" + bytes(63), signer + bytes(32)):
        data = encode(SignedRecord(domain="advert", signer=signer, payload=b"x", signature=signature))
        with pytest.raises(RemoteProtocolError):
            open_record(data)


def test_no_damage_goes_unnoticed() -> None:
    for data in damaged(RECORD):
        with pytest.raises(RemoteProtocolError):
            open_record(data)


def test_a_record_fits_a_gossip_message_both_ways() -> None:
    room = MAX_RECORD_BYTES - len(sign_record(key_of(1), "advert", b"")) - 4
    assert len(sign_record(key_of(1), "advert", bytes(room))) <= MAX_RECORD_BYTES
    with pytest.raises(LocalProtocolError, match="limit is 65536"):
        sign_record(key_of(1), "advert", bytes(MAX_RECORD_BYTES - 10))
    with pytest.raises(RemoteProtocolError, match="limit is 65536"):
        open_record(bytes(MAX_RECORD_BYTES + 1))


def test_vectors() -> None:
    parts = decode(SignedRecord, RECORD)

    def with_(**fields: object) -> bytes:
        values = {"domain": 1, "signer": 2, "payload": 3, "signature": 4}
        return dumps({key: fields.get(name, getattr(parts, name)) for name, key in values.items()})

    empty = sign_record(key_of(2), "head", b"")
    hold(
        "envelope",
        [
            Case("an advert", RECORD, open_record(RECORD)),
            Case("an empty payload", empty, open_record(empty)),
            Case("another domain", with_(domain="head")),
            Case("another signer", with_(signer=public_key_of(peer_of(2)))),
            Case("another payload", with_(payload=b"Payload")),
            Case("a signature of zeros", with_(signature=bytes(64))),
            Case("a key of small order", with_(signer=bytes(32), signature=bytes(64))),
            Case("a short signature", with_(signature=parts.signature[:-1])),
            Case("cut off", RECORD[:-1]),
            Case("a byte too many", RECORD + b"\0"),
            Case("nothing", b""),
        ],
        open_record,
    )
