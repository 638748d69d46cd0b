"""Who is who: the certificates and withdrawals that a node knows, and the tickets that it redeems.

No connection and no task: everything here is a short call, kept in the state file.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from typing import Final

from meshnode.core.clock import Wall
from meshnode.core.errors import Declined, IdentityError
from meshnode.core.log import get_logger
from meshnode.membership.port import Membership, Signer
from meshnode.membership.withdrawals import keep_withdrawal, restore_withdrawals
from meshnode.state.port import State
from protocols.codec import decode, encode
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, short
from protocols.membership import Standing, Untrusted
from protocols.membership.messages import (
    ADMIN,
    FORBIDDEN,
    MAX_CHAIN,
    MEMBER,
    Certificate,
    Chain,
    Granted,
    Join,
    Roster,
    Withdrawal,
)
from protocols.membership.sealing import NONCE_BYTES, seal_secret
from protocols.membership.trust import ordered_roles, sign_certificate, sign_withdrawal

MAX_MEMBERS: Final = 1024  # remembered certificates
_CHAINS: Final = 24  # in one Roster: at most 2 KiB each, 64 KiB allowed
_WITHDRAWALS: Final = 16  # in one Roster: at most 2 KiB each

_log = get_logger("membership")


class Registry:
    """Our own standing and everybody else's."""

    def __init__(
        self,
        identity: Signer,
        membership: Membership,
        state: State,
        clock: Wall,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """Raises IdentityError when our own certificate does not hold, or is of another key."""
        self.us = identity.peer_id
        self.membership = membership
        self.trust = membership.trust()
        self._key = identity.signing_key
        self._state = state
        self._clock = clock
        self.random_bytes = random_bytes
        self._chains: dict[PeerId, tuple[bytes, ...]] = {}
        restore_withdrawals(self.trust, state, clock())
        for peer, data in state.records(MEMBER).items():
            with suppress(RemoteProtocolError):  # of another version; a hello brings it again
                self._chains[PeerId(peer)] = decode(Chain, data).certificates
        standing = self._own()
        if standing.peer != self.us:
            raise IdentityError(
                f"the certificate of this node is of {short(standing.peer)}, its key of {short(self.us)}; restore "
                "the key that belongs to the certificate, or join again with a new ticket"
            )

    @property
    def standing(self) -> Standing:
        """Our own roles and certificate. Raises Untrusted when they were withdrawn or have expired."""
        return self.trust.check(self.membership.chain, self._clock())

    def _own(self) -> Standing:
        try:
            return self.standing
        except Untrusted as error:
            raise IdentityError(f"the membership of this node does not hold: {error}") from error

    def roles_of(self, peer: PeerId) -> frozenset[str]:
        """Roles of a peer whose certificate is known and holds now; empty for everybody else."""
        chain = self.membership.chain if peer == self.us else self._chains.get(peer)
        if chain is None:
            return frozenset()
        try:
            return self.trust.check(chain, self._clock()).roles
        except Untrusted:
            return frozenset()

    def keep(self, peer: PeerId, chain: tuple[bytes, ...]) -> bool:
        """Remember a chain that holds, unless a newer one is known; whether it was new."""
        known = self._chains.get(peer)
        if peer == self.us or known == chain or (known is None and len(self._chains) >= MAX_MEMBERS):
            return False
        if known is not None and self._age(known) >= self._age(chain):
            return False
        self._chains[peer] = chain
        self._state.put_record(MEMBER, peer, encode(Chain(certificates=chain)))
        return True

    def _age(self, chain: tuple[bytes, ...]) -> tuple[int, int]:
        """Order of the certificates of one peer; one that does not hold is older than all."""
        try:
            certificate = self.trust.check(chain, self._clock()).certificate
        except Untrusted:
            return (0, 0)
        return (certificate.issued_ms, certificate.serial)

    def rosters(self, first: Collection[PeerId]) -> Iterator[Roster]:
        """What we know, for one hello: these peers first; at most 10 messages of members, 6 of withdrawals."""
        peers = sorted(self._chains, key=lambda peer: (peer not in first, peer))
        chains = [Chain(certificates=self._chains[peer]) for peer in peers]
        for start in range(0, min(len(chains), 10 * _CHAINS), _CHAINS):
            yield Roster(members=tuple(chains[start : start + _CHAINS]))
        yield from packed(self.trust.withdrawals()[-6 * _WITHDRAWALS :])

    def learn(self, roster: Roster) -> tuple[bool, tuple[bytes, ...]]:
        """Take what holds; the rest is ignored, for the sender may not have known.

        Whether a certificate was new, and the withdrawals that were.
        """
        now = self._clock()
        new_member = False
        for chain in roster.members:
            with suppress(Untrusted):
                standing = self.trust.check(chain.certificates, now)
                new_member |= self.keep(standing.peer, chain.certificates)
        news = []
        for data in roster.withdrawals:
            with suppress(Untrusted):
                if self.trust.withdraw(data, now) is not None:
                    keep_withdrawal(self._state, data)
                    news.append(data)
        return new_member, tuple(news)

    def reload(self) -> tuple[bytes, ...]:
        """Take up the withdrawals that a command has put into the state file; those that were new."""
        known = set(self.trust.withdrawals())
        if not restore_withdrawals(self.trust, self._state, self._clock()):
            return ()
        return tuple(data for data in self.trust.withdrawals() if data not in known)

    def withdrawal(self, peer: PeerId, keeps: Iterable[str], reason: str) -> bytes:
        """Our signed word that takes roles from a member, or (nothing kept) puts it out. Not learned yet.

        Raises IdentityError when this node may not say that.
        """
        ours = self._own()
        if ADMIN not in ours.roles:
            raise IdentityError("this node may not withdraw memberships: its certificate lacks the role admin")
        chain = self.membership.chain if peer == self.us else self._chains.get(peer)
        if chain is not None and len(chain) <= ours.distance:
            raise IdentityError(
                f"{short(peer)} is as near to the founder as this node, so this node can't take its rights back. "
                "Do it on the node that holds the founder's key."
            )
        word = Withdrawal(
            network=self.trust.id,
            peer=peer,
            keeps=ordered_roles(keeps),
            issued_ms=self._clock(),
            reason=reason[:200],
            chain=self.membership.chain,
        )
        return sign_withdrawal(self._key, word)

    def grant(self, peer: PeerId, join: Join) -> Granted:
        """Redeem a ticket for the peer that proved its id on the connection.

        Raises Declined `forbidden`, `invite-expired`, `invite-used`.
        """
        now = self._clock()
        try:
            ours = self.standing
        except Untrusted as error:
            raise Declined(FORBIDDEN, f"the node that made the ticket is no member any more: {error}") from error
        if ADMIN not in ours.roles or ours.distance >= MAX_CHAIN:
            raise Declined(
                FORBIDDEN,
                "this node may not invite; a ticket is redeemed at the node that made it, which must be an admin",
            )
        invite = self._state.redeem(join.invite, join.secret, peer, now, not_before_ms=self.trust.withdrawn_ms(peer))
        certificate = Certificate(
            network=self.trust.id,
            peer=peer,
            roles=ordered_roles(set(invite.roles) & ours.roles),
            issued_ms=now,
            expires_ms=now + invite.member_ms if invite.member_ms else 0,
            serial=self._state.next_serial(),
        )
        chain = (*self.membership.chain, sign_certificate(self._key, certificate))
        self.keep(peer, chain)
        _log.info("member.invited", peer=peer, name=join.name, roles=certificate.roles)
        sealed = seal_secret(
            self.membership.secret,
            invite=join.invite,
            invite_secret=join.secret,
            joiner=peer,
            nonce=self.random_bytes(NONCE_BYTES),
        )
        return Granted(network=self.membership.network_record, chain=chain, sealed=sealed, wall_ms=now)


def packed(withdrawals: tuple[bytes, ...]) -> Iterator[Roster]:
    """Withdrawals in messages that fit the wire."""
    for start in range(0, len(withdrawals), _WITHDRAWALS):
        yield Roster(withdrawals=withdrawals[start : start + _WITHDRAWALS])
