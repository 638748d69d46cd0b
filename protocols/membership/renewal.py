"""The secrets of one network: the present one, and those before it, for members that were away when it changed.

A renewal is a founder's signed word that a secret, known by its digest, takes the place of those before it. The
secret itself goes only to members, over the streams on which they have proved that they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from nacl.signing import SigningKey

from protocols.codec import decode, encode
from protocols.envelope import open_record, sign_record
from protocols.errors import RemoteProtocolError
from protocols.ids import short
from protocols.membership.messages import (
    CLOCK,
    FORBIDDEN,
    INVITE,
    MAX_CLOCK_MS,
    MAX_RENEWAL_BYTES,
    MAX_SECRETS,
    OTHER_NETWORK,
    RENEWAL,
    SECRET_ID_BYTES,
    STRANGER,
    Renewal,
)
from protocols.membership.trust import Trust, Untrusted, day

_CONTEXT: Final = b"meshnode/secret/1"


def digest_of(secret: bytes) -> bytes:
    """32 bytes by which a secret is known to those who have it, and to nobody else anything."""
    return hashlib.sha256(_CONTEXT + secret).digest()


def id_of(secret: bytes) -> bytes:
    """The first bytes of the digest: how a hello names a secret."""
    return digest_of(secret)[:SECRET_ID_BYTES]


@dataclass(frozen=True, slots=True)
class Secret:
    """A network secret, and the signed word that made it the present one; empty for the first of the network."""

    secret: bytes = field(repr=False)  # 32 bytes
    renewal: bytes = field(default=b"", repr=False)  # signed record
    issued_ms: int = 0  # UTC milliseconds of the renewal

    @property
    def id(self) -> bytes:
        return id_of(self.secret)

    @property
    def rank(self) -> tuple[int, bytes]:
        """The highest is the present one: the newest, and of two that were made at the same time always the same."""
        return self.issued_ms, self.id


def sign_renewal(key: SigningKey, network: str, secret: bytes, issued_ms: int, chain: Sequence[bytes]) -> Secret:
    """A new secret with its record. `chain`: of the founder's device that signs; empty for a founder's key."""
    word = Renewal(network=network, issued_ms=issued_ms, digest=digest_of(secret), chain=tuple(chain))
    return Secret(secret, sign_record(key, RENEWAL, encode(word)), issued_ms)


def open_renewal(data: bytes, secret: bytes, trust: Trust, wall_ms: int) -> Secret:
    """A secret that a peer has handed over with its record, judged at UTC time `wall_ms`.

    Raises:
      Untrusted: badly encoded or signed, of another network or secret, from the future, or by nobody who may do it.
    """
    if len(data) > MAX_RENEWAL_BYTES:
        raise Untrusted(STRANGER, f"a renewal has {len(data)} bytes; {MAX_RENEWAL_BYTES} is the limit")
    try:
        opened = open_record(bytes(data), domain=RENEWAL)
        word = decode(Renewal, opened.payload)
    except RemoteProtocolError as error:
        raise Untrusted(STRANGER, f"a renewal of the network's secret does not hold: {error}") from error
    if word.network != trust.id:
        raise Untrusted(OTHER_NETWORK, "a renewal is of another network")
    if word.digest != digest_of(secret):
        raise Untrusted(STRANGER, "a renewal came with another secret than it speaks of")
    if word.issued_ms > wall_ms + MAX_CLOCK_MS:
        raise Untrusted(CLOCK, f"a renewal is dated {day(word.issued_ms)}, which is in the future")
    standing = trust.authority(opened.signer, word.chain, word.issued_ms)  # a later expiry undoes nothing
    if standing is not None and not (standing.is_founder and INVITE in standing.roles):
        raise Untrusted(FORBIDDEN, f"{short(opened.signer)} renewed the network's secret, but is no founder")
    return Secret(secret, bytes(data), word.issued_ms)


class Secrets:
    """The present secret of a network, and the last ones before it."""

    def __init__(self, known: Iterable[Secret]) -> None:
        """`known`: at least one."""
        by_id = {one.id: one for one in sorted(known, key=lambda one: one.rank)}
        self._known = tuple(sorted(by_id.values(), key=lambda one: one.rank, reverse=True)[:MAX_SECRETS])

    @property
    def present(self) -> Secret:
        return self._known[0]

    @property
    def all(self) -> tuple[Secret, ...]:
        """The present one first."""
        return self._known

    @property
    def ids(self) -> tuple[bytes, ...]:
        """How a hello names them."""
        return tuple(one.id for one in self._known)

    def plus(self, secret: Secret) -> Secrets:
        """With one more."""
        return Secrets((*self._known, secret))

    def first_of(self, ids: Sequence[bytes]) -> Secret | None:
        """The first of these that we know."""
        mine = {one.id: one for one in self._known}
        return next((mine[id_] for id_ in ids if id_ in mine), None)

    def first_in(self, ids: Collection[bytes]) -> Secret | None:
        """The newest of ours that is among these."""
        return next((one for one in self._known if one.id in ids), None)
