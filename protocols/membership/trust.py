"""Who is a member: certificate chains and withdrawals, judged against the founders of one network.

The verdict is a function of the *set* of withdrawals, whatever their order, so that all nodes that know the
same records agree. Authority falls with the distance from the founders: a signer at distance k (founder 0,
certified by a founder 1, ...) can withdraw only certificates at a greater distance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from nacl.signing import SigningKey

from protocols.codec import decode, encode
from protocols.envelope import Opened, open_record, sign_record
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId, peer_id_of, public_key_of, short
from protocols.membership.messages import (
    ASK,
    CLOCK,
    EXPIRED,
    FORBIDDEN,
    INVITE,
    MAX_CERTIFICATE_BYTES,
    MAX_CHAIN,
    MAX_CLOCK_MS,
    MAX_LINKS,
    MAX_WITHDRAWAL_BYTES,
    MEMBER,
    OTHER_NETWORK,
    ROLES,
    SERVE,
    STRANGER,
    SUCCESSION,
    WITHDRAWAL,
    Certificate,
    Network,
    Succession,
    Withdrawal,
    printable,
)
from protocols.membership.network import network_id
from protocols.membership.succession import read_succession

MAX_WITHDRAWALS: Final = 256  # of one signer; an ousted inviter can't fill the memory of others
MAX_ALL_WITHDRAWALS: Final = 1024  # of everybody but founders and their devices: inviters can invite inviters


class Untrusted(RemoteProtocolError):
    """A peer is not (or no longer) a member. `code` is one of CODES; the text is the sentence to show."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a valid chain gives: the last certificate, and the roles (implied ones, too) that no withdrawal took."""

    peer: PeerId
    roles: frozenset[str]
    certificate: Certificate
    distance: int  # certificates between the founders and the peer, 1 to MAX_CHAIN
    expires_ms: int  # earliest expiry of the chain; 0: never

    @property
    def is_founder(self) -> bool:
        """Whether a founder's key itself vouches for the device: its word goes before a member's."""
        return self.distance == 1


@lru_cache(maxsize=1024)
def _open(data: bytes, domain: str | None) -> Opened:
    """Signatures are checked once: hello, roster and gossip bring the same records again and again."""
    return open_record(data, domain=domain)


_read_succession = lru_cache(maxsize=256)(read_succession)


def _opened(data: bytes) -> Opened:
    """One record of a chain. Raises Untrusted."""
    if len(data) > MAX_CERTIFICATE_BYTES:
        raise Untrusted(
            STRANGER, f"it shows a certificate of {len(data)} bytes; {MAX_CERTIFICATE_BYTES} is the limit"
        )
    try:
        opened = _open(bytes(data), None)
    except RemoteProtocolError as error:
        raise Untrusted(STRANGER, f"it shows a certificate that does not hold: {error}") from error
    if opened.domain not in (MEMBER, SUCCESSION):
        raise Untrusted(STRANGER, f"it shows a certificate that does not hold: it is a record of {opened.domain!r}")
    return opened


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


def implied(roles: Iterable[str]) -> frozenset[str]:
    """The roles that these give: who serves may ask, for it works for the others."""
    given = frozenset(roles)
    return given | {ASK} if SERVE in given else given


def sign_certificate(key: SigningKey, certificate: Certificate) -> bytes:
    """The signed record of a certificate."""
    return sign_record(key, MEMBER, encode(certificate))


def sign_withdrawal(key: SigningKey, withdrawal: Withdrawal) -> bytes:
    """The signed record of a withdrawal."""
    return sign_record(key, WITHDRAWAL, encode(withdrawal))


def _proper(roles: tuple[str, ...]) -> bool:
    return roles == tuple(role for role in ROLES if role in roles)


def _subject(opened: Opened) -> str:
    """Whom a record of a chain is about. Raises RemoteProtocolError."""
    if opened.domain == SUCCESSION:
        return _read_succession(opened).successor
    return decode(Certificate, opened.payload).peer


@dataclass(frozen=True, slots=True)
class _Taken:
    data: bytes
    withdrawal: Withdrawal
    signer: PeerId
    distance: int  # of the signer


class Trust:
    """The founders of one network, and the withdrawals and new keys known so far."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.id = network_id(network)
        self._known: dict[tuple[str, PeerId], _Taken] = {}  # by (subject, signer): the newest
        self._effective: dict[str, tuple[_Taken, ...]] = {}  # by subject
        self._successions: dict[PeerId, Succession] = {}  # by old key: what was learned first

    def check(self, chain: Sequence[bytes], wall_ms: int) -> Standing:
        """Judge a chain at UTC time `wall_ms`.

        Raises:
          Untrusted: with the code (stranger, other-network, expired, clock, forbidden) and the sentence.
        """
        standing, _ = self._walk(chain, wall_ms)
        if standing is None:
            raise Untrusted(STRANGER, "it shows no certificate of this network; ask a member for a ticket")
        moved = self._successions.get(standing.peer)
        if moved is not None and moved.issued_ms <= wall_ms:
            raise Untrusted(
                FORBIDDEN,
                f"the key of {short(standing.peer)} was replaced on {day(moved.issued_ms)} by that of "
                f"{short(moved.successor)}, and counts no more",
            )
        return standing

    def authority(self, signer: PeerId, chain: Sequence[bytes], at_ms: int) -> Standing | None:
        """What lets somebody speak for the network, judged at that time; None: it is a founder's key itself.

        `chain`: of the signer; for a founder's key the successions that lead to it, as a rule none.

        Raises Untrusted when the signer is neither, or its chain does not hold.
        """
        standing, key = self._walk(chain, at_ms)
        if standing is None:
            if not (signer == key if chain else public_key_of(signer) in self.network.founders):
                raise Untrusted(STRANGER, f"{short(signer)} is no founder of this network and shows no certificate")
            moved = self._successions.get(signer)
            if moved is not None and moved.issued_ms < at_ms:
                raise Untrusted(FORBIDDEN, f"the founder's key {short(signer)} had been replaced")
            return None
        if standing.peer != signer:
            raise Untrusted(FORBIDDEN, f"{short(signer)} shows the certificate of {short(standing.peer)}")
        return self.check(chain, at_ms)

    def _walk(self, chain: Sequence[bytes], wall_ms: int) -> tuple[Standing | None, PeerId | None]:
        """The standing at the end of a chain, if there is a certificate in it; and the key that stands there."""
        if len(chain) > MAX_LINKS:
            raise Untrusted(STRANGER, f"it shows {len(chain)} records in a row; {MAX_LINKS} is the limit")
        standing: Standing | None = None
        key: PeerId | None = None  # whose signature comes next; None: any founder's
        for data in chain:
            opened = _opened(data)
            if opened.domain == SUCCESSION:
                word = self._successor(opened, key, wall_ms)
                key = PeerId(word.successor)
                if standing is not None:
                    roles = self._left(key, standing.roles, word.issued_ms, standing.distance)
                    standing = replace(standing, peer=key, roles=roles)
            else:
                standing = self._link(standing, key, opened, wall_ms)
                key = standing.peer
        return standing, key

    def inviter_of(self, chain: Sequence[bytes]) -> PeerId | None:
        """Who vouches for the last peer of a chain, whether the chain holds or not; None: a founder's key itself."""
        try:
            signers = [opened.signer for opened in map(_opened, chain) if opened.domain == MEMBER]
        except Untrusted:
            return None
        return signers[-1] if len(signers) > 1 else None

    def _successor(self, opened: Opened, key: PeerId | None, wall_ms: int) -> Succession:
        """The word of a key that hands its place over, if it has that place and has not given it to another."""
        signer = opened.signer
        try:
            word = _read_succession(opened)
        except RemoteProtocolError as error:
            raise Untrusted(STRANGER, f"it shows a record of a new key that does not hold: {error}") from error
        if word.network != self.id:
            raise Untrusted(OTHER_NETWORK, f"the record of a new key of {short(signer)} is of another network")
        if not (public_key_of(signer) in self.network.founders if key is None else signer == key):
            raise Untrusted(STRANGER, f"{short(signer)} hands over a place in the network that it does not have")
        if word.issued_ms > wall_ms + MAX_CLOCK_MS:
            raise Untrusted(CLOCK, f"the new key of {short(signer)} is dated {day(word.issued_ms)}, in the future")
        known = self._successions.get(signer)
        if known is not None and known.successor != word.successor:
            raise Untrusted(
                FORBIDDEN, f"the key of {short(signer)} was replaced by that of {short(known.successor)} already"
            )
        return word

    def succeed(self, chain: Iterable[bytes]) -> dict[PeerId, bytes]:
        """Learn which keys a chain that holds has replaced: the records that were new, by the old key's peer id.

        What was learned first is final: a thief of the old key comes too late.
        """
        new = {}
        for data in chain:
            opened = _opened(data)
            if opened.domain == SUCCESSION and opened.signer not in self._successions:
                self._successions[opened.signer] = _read_succession(opened)
                new[opened.signer] = bytes(data)
        if new:
            self._settle()
        return new

    def predecessors(self, peer: str) -> tuple[PeerId, ...]:
        """The keys that this peer had before, the last one first."""
        before = {word.successor: old for old, word in self._successions.items()}
        out: list[PeerId] = []
        while peer in before and before[peer] not in out:
            peer = before[peer]
            out.append(PeerId(peer))
        return tuple(out)

    def founder_path(self, key: PeerId, records: Mapping[PeerId, bytes]) -> tuple[bytes, ...]:
        """The successions that lead from a founder of the network record to this key; `records` by old key."""
        founders = [peer_id_of(founder) for founder in self.network.founders]
        before = self.predecessors(key)
        if key in founders or not before or before[-1] not in founders:
            return ()
        return tuple(records[old] for old in reversed(before))

    def _link(self, above: Standing | None, key: PeerId | None, opened: Opened, wall_ms: int) -> Standing:
        try:
            certificate = decode(Certificate, opened.payload)
            public_key_of(certificate.peer)
        except RemoteProtocolError as error:
            raise Untrusted(STRANGER, f"it shows a certificate that does not hold: {error}") from error
        subject = short(certificate.peer)
        if certificate.network != self.id:
            raise Untrusted(OTHER_NETWORK, f"the certificate of {subject} is of another network")
        if not _proper(certificate.roles):
            raise Untrusted(STRANGER, f"the certificate of {subject} names roles that do not exist")
        if key is None:
            if public_key_of(opened.signer) not in self.network.founders:
                raise Untrusted(STRANGER, f"the certificate of {subject} is signed by nobody this network trusts")
        elif opened.signer != key:
            raise Untrusted(STRANGER, f"the certificate of {subject} is not signed by the one before it")
        moved = self._successions.get(opened.signer)
        if moved is not None and certificate.issued_ms > moved.issued_ms:
            raise Untrusted(
                FORBIDDEN, f"the certificate of {subject} is signed with a key that had been replaced before"
            )
        distance = 1 if above is None else above.distance + 1
        if distance > MAX_CHAIN:
            raise Untrusted(STRANGER, f"it shows {distance} certificates in a row; {MAX_CHAIN} is the limit")
        if above is not None and INVITE not in above.roles:
            raise Untrusted(
                FORBIDDEN,
                f"{short(above.peer)}, who vouched for {subject}, may not invite; ask somebody who may for a ticket",
            )
        if above is not None and (extra := set(certificate.roles) - implied(above.certificate.roles)):
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
                "somebody who may invite can give it a new ticket",
            )
        ends = [ms for ms in (certificate.expires_ms, above.expires_ms if above else 0) if ms]
        peer = PeerId(certificate.peer)
        return Standing(
            peer=peer,
            roles=self._left(peer, implied(certificate.roles), certificate.issued_ms, distance),
            certificate=certificate,
            distance=distance,
            expires_ms=min(ends, default=0),
        )

    def _left(self, peer: PeerId, roles: frozenset[str], issued_ms: int, distance: int) -> frozenset[str]:
        """The roles that no withdrawal took, of those that a record of that time gives the peer."""
        for taken in self._effective.get(peer, ()):
            word = taken.withdrawal
            if taken.distance >= distance or issued_ms > word.issued_ms:
                continue
            if not word.keeps:
                raise Untrusted(
                    FORBIDDEN,
                    f"the membership of {short(peer)} was withdrawn on {day(word.issued_ms)}: "
                    f"{printable(word.reason) or 'no reason given'}; somebody who may invite can give it a new "
                    "ticket",
                )
            roles &= implied(word.keeps)
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
        if known is None and distance > 1 and len(self._known) >= MAX_ALL_WITHDRAWALS:
            raise Untrusted(FORBIDDEN, f"{len(self._known)} withdrawals are known; no more of members count")
        self._known[withdrawal.peer, opened.signer] = _Taken(bytes(data), withdrawal, opened.signer, distance)
        self._settle()
        return PeerId(withdrawal.peer)

    def _authority(self, signer: PeerId, withdrawal: Withdrawal) -> int:
        """Distance of the signer, by certificates alone: whether its word is in force is decided in `_settle`.

        Judged at the time of the withdrawal, so that a later expiry undoes nothing.
        """
        standing = Trust(self.network).authority(signer, withdrawal.chain, withdrawal.issued_ms)
        if standing is None:
            return 0
        if INVITE not in standing.roles:
            raise Untrusted(FORBIDDEN, f"{short(signer)} signed a withdrawal without the role invite")
        return standing.distance

    def _settle(self) -> None:
        """Rebuild what is in force, nearest signers first: each is judged by those nearer than itself."""
        self._effective = {}
        for taken in sorted(self._known.values(), key=lambda t: (t.distance, t.withdrawal.issued_ms, t.data)):
            word = taken.withdrawal
            try:
                standing = self.authority(taken.signer, word.chain, word.issued_ms)
            except Untrusted:
                continue
            if standing is not None and INVITE not in standing.roles:
                continue
            subject = taken.withdrawal.peer
            self._effective[subject] = (*self._effective.get(subject, ()), taken)

    def withdrawals(self) -> tuple[bytes, ...]:
        """The signed records in force, in a fixed order."""
        return tuple(taken.data for subject in sorted(self._effective) for taken in self._effective[subject])

    def against(self, peer: PeerId, chain: Sequence[bytes]) -> tuple[bytes, ...]:
        """The records in force that limit a peer who shows this chain of its own, whether it holds or not."""
        try:
            subjects = [_subject(_opened(data)) for data in chain]
        except RemoteProtocolError:
            return ()
        if not subjects or subjects[-1] != peer:
            return ()  # it is not for strangers to read who was put out
        return tuple(taken.data for subject in dict.fromkeys(subjects) for taken in self._effective.get(subject, ()))

    def ousted(self) -> dict[PeerId, int]:
        """Everybody whose membership was taken whole, and when last (UTC milliseconds); some have a newer one."""
        return {
            PeerId(subject): max(one.withdrawal.issued_ms for one in taken if not one.withdrawal.keeps)
            for subject, taken in self._effective.items()
            if any(not one.withdrawal.keeps for one in taken)
        }

    def was_put_out(self, peer: PeerId) -> bool:
        """Whether its membership was ever taken whole; it may have a newer one."""
        return any(not taken.withdrawal.keeps for taken in self._effective.get(peer, ()))

    def withdrawn_ms(self, peer: PeerId) -> int:
        """When rights were last taken from the peer (UTC milliseconds); 0: never. No older invite gives them back."""
        return max((taken.withdrawal.issued_ms for taken in self._effective.get(peer, ())), default=0)
