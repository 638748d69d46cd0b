"""Who is a member: certificate chains and withdrawals, judged against the founders of one network.

The verdict is a function of the *set* of withdrawals, whatever their order, so that all nodes that know the
same records agree. Authority falls with the distance from the founders: a signer at distance k (founder 0,
certified by a founder 1, ...) can withdraw only certificates at a greater distance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from nacl.signing import SigningKey

from protocols.codec import decode, encode
from protocols.envelope import Opened, open_record, sign_record
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId, public_key_of, short
from protocols.membership.messages import (
    ADMIN,
    CLOCK,
    EXPIRED,
    FORBIDDEN,
    MAX_CERTIFICATE_BYTES,
    MAX_CHAIN,
    MAX_CLOCK_MS,
    MAX_WITHDRAWAL_BYTES,
    MEMBER,
    OTHER_NETWORK,
    ROLES,
    STRANGER,
    WITHDRAWAL,
    Certificate,
    Network,
    Withdrawal,
    printable,
)
from protocols.membership.network import network_id

MAX_WITHDRAWALS: Final = 256  # of one signer; an ousted admin can't fill the memory of others


class Untrusted(RemoteProtocolError):
    """A peer is not (or no longer) a member. `code` is one of CODES; the text is the sentence to show."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a valid chain gives: the last certificate, and the roles that no withdrawal took."""

    peer: PeerId
    roles: frozenset[str]
    certificate: Certificate
    distance: int  # certificates between the founders and the peer, 1 to MAX_CHAIN
    expires_ms: int  # earliest expiry of the chain; 0: never


@lru_cache(maxsize=1024)
def _open(data: bytes, domain: str) -> Opened:
    """Signatures are checked once: hello, roster and gossip bring the same records again and again."""
    return open_record(data, domain=domain)


def day(wall_ms: int) -> str:
    """UTC time for people, to the minute."""
    if not 0 <= wall_ms < 250_000_000_000_000:  # the year 9892: datetime ends at 9999
        return "an impossible date"
    return datetime.fromtimestamp(wall_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def ordered_roles(roles: Iterable[str]) -> tuple[str, ...]:
    """Roles in their canonical order. Raises LocalProtocolError for a word that is no role."""
    wanted = set(roles)
    if unknown := wanted - set(ROLES):
        raise LocalProtocolError(f"{min(unknown)!r} is no role; roles are {', '.join(ROLES)}")
    return tuple(role for role in ROLES if role in wanted)


def sign_certificate(key: SigningKey, certificate: Certificate) -> bytes:
    """The signed record of a certificate."""
    return sign_record(key, MEMBER, encode(certificate))


def sign_withdrawal(key: SigningKey, withdrawal: Withdrawal) -> bytes:
    """The signed record of a withdrawal."""
    return sign_record(key, WITHDRAWAL, encode(withdrawal))


def _proper(roles: tuple[str, ...]) -> bool:
    return roles == tuple(role for role in ROLES if role in roles)


@dataclass(frozen=True, slots=True)
class _Taken:
    data: bytes
    withdrawal: Withdrawal
    distance: int  # of the signer


class Trust:
    """The founders of one network and the withdrawals known so far."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.id = network_id(network)
        self._known: dict[tuple[str, PeerId], _Taken] = {}  # by (subject, signer): the newest
        self._effective: dict[str, tuple[_Taken, ...]] = {}  # by subject

    def check(self, chain: Sequence[bytes], wall_ms: int) -> Standing:
        """Judge a chain at UTC time `wall_ms`.

        Raises:
          Untrusted: with the code (stranger, other-network, expired, clock, forbidden) and the sentence.
        """
        if not chain:
            raise Untrusted(STRANGER, "it shows no certificate of this network; ask a member for a ticket")
        if len(chain) > MAX_CHAIN:
            raise Untrusted(STRANGER, f"it shows {len(chain)} certificates in a row; {MAX_CHAIN} is the limit")
        standing: Standing | None = None
        for data in chain:
            standing = self._link(standing, data, wall_ms)
        assert standing is not None  # the chain is not empty
        return standing

    def _link(self, above: Standing | None, data: bytes, wall_ms: int) -> Standing:
        if len(data) > MAX_CERTIFICATE_BYTES:
            raise Untrusted(
                STRANGER, f"it shows a certificate of {len(data)} bytes; {MAX_CERTIFICATE_BYTES} is the limit"
            )
        try:
            opened = _open(bytes(data), MEMBER)
            certificate = decode(Certificate, opened.payload)
            public_key_of(certificate.peer)
        except RemoteProtocolError as error:
            raise Untrusted(STRANGER, f"it shows a certificate that does not hold: {error}") from error
        subject = short(certificate.peer)
        if certificate.network != self.id:
            raise Untrusted(OTHER_NETWORK, f"the certificate of {subject} is of another network")
        if not _proper(certificate.roles):
            raise Untrusted(STRANGER, f"the certificate of {subject} names roles that do not exist")
        if above is None:
            if public_key_of(opened.signer) not in self.network.founders:
                raise Untrusted(STRANGER, f"the certificate of {subject} is signed by nobody this network trusts")
        elif opened.signer != above.peer:
            raise Untrusted(STRANGER, f"the certificate of {subject} is not signed by the one before it")
        elif ADMIN not in above.roles:
            raise Untrusted(
                FORBIDDEN, f"{short(above.peer)}, who vouched for {subject}, is no admin; ask an admin for a ticket"
            )
        elif extra := set(certificate.roles) - set(above.certificate.roles):
            raise Untrusted(
                FORBIDDEN, f"{short(above.peer)} gave {subject} the role {min(extra)!r} without having it"
            )
        if certificate.issued_ms > wall_ms + MAX_CLOCK_MS:
            raise Untrusted(
                CLOCK,
                f"the certificate of {subject} was issued on {day(certificate.issued_ms)}, which is in the future; "
                "set the clocks of both devices",
            )
        if certificate.expires_ms and certificate.expires_ms <= wall_ms:
            raise Untrusted(
                EXPIRED,
                f"the certificate of {subject} expired on {day(certificate.expires_ms)}; "
                "an admin can give it a new ticket",
            )
        distance = 1 if above is None else above.distance + 1
        ends = [ms for ms in (certificate.expires_ms, above.expires_ms if above else 0) if ms]
        return Standing(
            peer=PeerId(certificate.peer),
            roles=self._left(certificate, distance),
            certificate=certificate,
            distance=distance,
            expires_ms=min(ends, default=0),
        )

    def _left(self, certificate: Certificate, distance: int) -> frozenset[str]:
        roles = frozenset(certificate.roles)
        for taken in self._effective.get(certificate.peer, ()):
            word = taken.withdrawal
            if taken.distance >= distance or certificate.issued_ms > word.issued_ms:
                continue
            if not word.keeps:
                raise Untrusted(
                    FORBIDDEN,
                    f"the membership of {short(certificate.peer)} was withdrawn on {day(word.issued_ms)}: "
                    f"{printable(word.reason) or 'no reason given'}; an admin can give it a new ticket",
                )
            roles &= frozenset(word.keeps)
        return roles

    def withdraw(self, data: bytes, wall_ms: int) -> PeerId | None:
        """Learn a withdrawal, in force or not; the peer it is about, or None when it says nothing new.

        Raises:
          Untrusted: badly encoded or signed, of another network, from the future, or its signer may not do it.
        """
        if len(data) > MAX_WITHDRAWAL_BYTES:
            raise Untrusted(STRANGER, f"a withdrawal has {len(data)} bytes; {MAX_WITHDRAWAL_BYTES} is the limit")
        try:
            opened = _open(bytes(data), WITHDRAWAL)
            withdrawal = decode(Withdrawal, opened.payload)
            public_key_of(withdrawal.peer)
        except RemoteProtocolError as error:
            raise Untrusted(STRANGER, f"a withdrawal does not hold: {error}") from error
        if withdrawal.network != self.id:
            raise Untrusted(OTHER_NETWORK, "a withdrawal is of another network")
        if not _proper(withdrawal.keeps):
            raise Untrusted(STRANGER, f"a withdrawal about {short(withdrawal.peer)} names roles that do not exist")
        if withdrawal.issued_ms > wall_ms + MAX_CLOCK_MS:
            raise Untrusted(CLOCK, f"a withdrawal is dated {day(withdrawal.issued_ms)}, which is in the future")
        distance = self._authority(opened.signer, withdrawal)
        known = self._known.get((withdrawal.peer, opened.signer))
        if known is not None and (known.withdrawal.issued_ms, known.data) >= (withdrawal.issued_ms, bytes(data)):
            return None
        if known is None and sum(signer == opened.signer for _, signer in self._known) >= MAX_WITHDRAWALS:
            raise Untrusted(
                FORBIDDEN, f"{short(opened.signer)} withdrew {MAX_WITHDRAWALS} memberships; no more count"
            )
        self._known[withdrawal.peer, opened.signer] = _Taken(bytes(data), withdrawal, distance)
        self._settle()
        return PeerId(withdrawal.peer)

    def _authority(self, signer: PeerId, withdrawal: Withdrawal) -> int:
        """Distance of the signer, by certificates alone: whether its word is in force is decided in `_settle`.

        Judged at the time of the withdrawal, so that a later expiry undoes nothing.
        """
        if not withdrawal.chain:
            if public_key_of(signer) not in self.network.founders:
                raise Untrusted(
                    STRANGER, f"{short(signer)} signed a withdrawal, but is no founder and shows no chain"
                )
            return 0
        standing = Trust(self.network).check(withdrawal.chain, withdrawal.issued_ms)
        if standing.peer != signer or ADMIN not in standing.roles:
            raise Untrusted(FORBIDDEN, f"{short(signer)} signed a withdrawal without being an admin")
        return standing.distance

    def _settle(self) -> None:
        """Rebuild what is in force, nearest signers first: each is judged by those nearer than itself."""
        self._effective = {}
        for taken in sorted(self._known.values(), key=lambda t: (t.distance, t.withdrawal.issued_ms, t.data)):
            if taken.withdrawal.chain:
                try:
                    standing = self.check(taken.withdrawal.chain, taken.withdrawal.issued_ms)
                except Untrusted:
                    continue
                if ADMIN not in standing.roles:
                    continue
            subject = taken.withdrawal.peer
            self._effective[subject] = (*self._effective.get(subject, ()), taken)

    def withdrawals(self) -> tuple[bytes, ...]:
        """The signed records in force, in a fixed order."""
        return tuple(taken.data for subject in sorted(self._effective) for taken in self._effective[subject])

    def withdrawn_ms(self, peer: PeerId) -> int:
        """When rights were last taken from the peer (UTC milliseconds); 0: never. No older invite gives them back."""
        return max((taken.withdrawal.issued_ms for taken in self._effective.get(peer, ())), default=0)
