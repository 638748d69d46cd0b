"""A domain-separated Ed25519 signature around a payload. See SPEC.md.

The signature covers the received bytes, never a re-encoded object, and starts with the domain, so that a
record of one kind can't be replayed as another kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from protocols.codec import at, decode, encode
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId, peer_id_of

MAX_RECORD_BYTES: Final = 64 * 1024  # fits a GossipSub message with room
_CONTEXT: Final = b"meshnode/record/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedRecord:
    domain: str = at(1, limit=64)  # what kind of record this is, e.g. "advert"
    signer: bytes = at(2, size=32)  # Ed25519 public key
    payload: bytes = at(3, limit=MAX_RECORD_BYTES)
    signature: bytes = at(4, size=64)


@dataclass(frozen=True, slots=True)
class Opened:
    """A record whose signature holds."""

    domain: str
    signer: PeerId
    payload: bytes


class ClaimedRecord:
    """A record whose signature nobody has checked yet: whom it names may have nothing to do with it."""

    def __init__(self, data: bytes) -> None:
        """Raises RemoteProtocolError: too large, or badly encoded."""
        if len(data) > MAX_RECORD_BYTES:
            raise RemoteProtocolError(f"a record of {len(data)} bytes; the limit is {MAX_RECORD_BYTES}")
        self._record = decode(SignedRecord, data)
        self.domain = self._record.domain
        self.signer = peer_id_of(self._record.signer)

    def open(self) -> Opened:
        """Check the signature. Raises RemoteProtocolError when it does not hold."""
        record = self._record
        try:
            VerifyKey(record.signer).verify(_signed_bytes(record.domain, record.payload), record.signature)
        except (BadSignatureError, ValueError) as error:
            raise RemoteProtocolError(
                f"the signature on a {self.domain!r} record of {self.signer} is wrong"
            ) from error
        return Opened(self.domain, self.signer, record.payload)


def _signed_bytes(domain: str, payload: bytes) -> bytes:
    name = domain.encode()
    return b"".join((_CONTEXT, len(name).to_bytes(2, "big"), name, payload))


def sign_record(key: SigningKey, domain: str, payload: bytes) -> bytes:
    """The encoded, signed record.

    Raises:
      LocalProtocolError: the record would be larger than `MAX_RECORD_BYTES`.
    """
    signature = key.sign(_signed_bytes(domain, payload)).signature
    data = encode(SignedRecord(domain=domain, signer=bytes(key.verify_key), payload=payload, signature=signature))
    if len(data) > MAX_RECORD_BYTES:
        raise LocalProtocolError(f"a {domain!r} record of {len(data)} bytes; the limit is {MAX_RECORD_BYTES}")
    return data


def open_record(data: bytes, *, domain: str | None = None) -> Opened:
    """Check a record and give its payload.

    Args:
      domain: the only domain that is acceptable; None accepts every domain (the caller then looks).

    Raises:
      RemoteProtocolError: too large, badly encoded, of another domain, or the signature does not hold.
    """
    record = ClaimedRecord(data)
    if domain is not None and record.domain != domain:
        raise RemoteProtocolError(f"a record of the kind {record.domain!r} where {domain!r} is expected")
    return record.open()
