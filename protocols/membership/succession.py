"""A key hands its place over to another one: the old key signs, and the new one agrees.

The record stands in a chain behind what gave the old key its place: behind a certificate for the key of a member, at
the beginning for a founder's key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from protocols.codec import decode, encode
from protocols.envelope import Opened, open_record, sign_record
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, peer_id_of, public_key_of
from protocols.membership.messages import CONSENT_BYTES, SUCCESSION, Succession

_CONTEXT: Final = b"meshnode/succession/1"


def sign_succession(old: SigningKey, new: SigningKey, network: str, issued_ms: int) -> bytes:
    """The signed record with which `old` hands over to `new`."""
    word = Succession(
        network=network,
        successor=peer_id_of(bytes(new.verify_key)),
        issued_ms=issued_ms,
        consent=bytes(CONSENT_BYTES),
    )
    consent = new.sign(_agreed(peer_id_of(bytes(old.verify_key)), word)).signature
    return sign_record(old, SUCCESSION, encode(replace(word, consent=bytes(consent))))


def read_succession(opened: Opened) -> Succession:
    """The content of an opened record.

    Raises RemoteProtocolError: badly encoded, no key of its own kind, or the new key did not agree.
    """
    word = decode(Succession, opened.payload)
    key = public_key_of(word.successor)
    if word.successor == opened.signer:
        raise RemoteProtocolError("a key can't succeed itself")
    try:
        VerifyKey(key).verify(_agreed(opened.signer, word), word.consent)
    except BadSignatureError as error:
        raise RemoteProtocolError("the new key did not agree to succeed the old one") from error
    return word


def _agreed(old: PeerId, word: Succession) -> bytes:
    """What the new key signs: the whole word, bound to the old key; without it, anybody could be named."""
    return _CONTEXT + old.encode("ascii") + encode(replace(word, consent=bytes(CONSENT_BYTES)))


def earlier(chain: tuple[bytes, ...]) -> Iterator[tuple[bytes, ...]]:
    """What a chain was before its last keys were replaced: without the successions at its end, one by one."""
    while len(chain) > 1 and _is_succession(chain[-1]):
        chain = chain[:-1]
        yield chain


def heirs(chain: Iterable[bytes]) -> tuple[PeerId, ...]:
    """The keys that have succeeded others in a chain."""
    return tuple(PeerId(read_succession(open_record(data)).successor) for data in chain if _is_succession(data))


def by_old_key(chain: Iterable[bytes]) -> dict[PeerId, bytes]:
    """The successions in a chain, by the peer id of the key that was replaced."""
    return {open_record(data).signer: data for data in chain if _is_succession(data)}


def _is_succession(data: bytes) -> bool:
    try:
        return open_record(data).domain == SUCCESSION
    except RemoteProtocolError:
        return False
