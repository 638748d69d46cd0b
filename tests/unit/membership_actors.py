"""A network with fixed keys for tests: a founder, and members that vouch for each other."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from nacl.signing import SigningKey

from protocols.ids import PeerId, peer_id_of
from protocols.membership import ROLES, Credentials, Network, Secret, Secrets, Trust, network_id, sign_network
from protocols.membership.messages import Certificate, Withdrawal
from protocols.membership.trust import ordered_roles, sign_certificate, sign_withdrawal

NOW_MS = 1_700_000_000_000


def key_of(name: str) -> SigningKey:
    """The same key for the same name, always."""
    return SigningKey(hashlib.sha256(name.encode()).digest())


def peer_of_key(name: str) -> PeerId:
    return peer_id_of(bytes(key_of(name).verify_key))


@dataclass(frozen=True)
class World:
    """One network. People are named; their keys follow from their names."""

    founder: str = "founder"
    secret: bytes = bytes(range(32))

    @property
    def network(self) -> Network:
        founder = bytes(key_of(self.founder).verify_key)
        return Network(
            name="home",
            nonce=hashlib.sha256(self.founder.encode()).digest()[:16],
            founders=(founder,),
            created_ms=NOW_MS,
        )

    @property
    def network_record(self) -> bytes:
        return sign_network(key_of(self.founder), self.network)

    def trust(self) -> Trust:
        return Trust(self.network)

    def certificate(
        self,
        name: str,
        *,
        by: str,
        roles: tuple[str, ...] = ROLES,
        issued_ms: int = NOW_MS,
        expires_ms: int = 0,
        serial: int = 0,
    ) -> bytes:
        return sign_certificate(
            key_of(by),
            Certificate(
                network=network_id(self.network),
                peer=peer_of_key(name),
                roles=ordered_roles(roles),
                issued_ms=issued_ms,
                expires_ms=expires_ms,
                serial=serial,
            ),
        )

    def chain(self, *names: str, roles: tuple[str, ...] = ROLES, expires_ms: int = 0) -> tuple[bytes, ...]:
        """Certificates from the founder over `names` to the last one, who gets `roles`; the others have all."""
        out = []
        for by, name in zip((self.founder, *names), names, strict=False):
            last = name == names[-1]
            out.append(
                self.certificate(name, by=by, roles=roles if last else ROLES, expires_ms=expires_ms if last else 0)
            )
        return tuple(out)

    def withdrawal(
        self,
        name: str,
        *,
        by: str,
        chain: tuple[bytes, ...] = (),
        keeps: tuple[str, ...] = (),
        issued_ms: int = NOW_MS + 1000,
        reason: str = "it was sold",
    ) -> bytes:
        return sign_withdrawal(
            key_of(by),
            Withdrawal(
                network=network_id(self.network),
                peer=peer_of_key(name),
                keeps=keeps,
                issued_ms=issued_ms,
                reason=reason,
                chain=chain,
            ),
        )

    def credentials(self, *names: str, secret: bytes | None = None) -> Credentials:
        return Credentials(
            peer=peer_of_key(names[-1]),
            name=names[-1],
            software="0.1.0",
            chain=self.chain(*names),
            secrets=Secrets([Secret(self.secret if secret is None else secret)]),
        )
