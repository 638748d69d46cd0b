"""What /meshnode/hello/1 says, and the signed records that membership rests on. See SPEC.md.

Network, Certificate and Withdrawal travel as signed records of the domains "network", "member" and
"withdrawal"; the signer of a certificate or withdrawal is the signer of its record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.codec import Union, at, message

PROTOCOL: Final = "/meshnode/hello/1"
TOPIC: Final = "/meshnode/membership/1"  # gossip of one Roster per message

NETWORK: Final = "network"
MEMBER: Final = "member"
WITHDRAWAL: Final = "withdrawal"
RENEWAL: Final = "secret"
SUCCESSION: Final = "succession"

# ASK: have questions answered by the layers of others. SERVE: hold layers and files for others, and ask.
# PUBLISH: say which model the network serves. INVITE: let devices in with these roles, and put them out again.
# TRAIN: have what this device learned mixed into what others learn. VOTE: say whether that may be served.
ASK, SERVE, PUBLISH, INVITE, TRAIN, VOTE = "ask", "serve", "publish", "invite", "train", "vote"
ROLES: Final = (ASK, SERVE, PUBLISH, INVITE, TRAIN, VOTE)

STRANGER, OTHER_NETWORK, EXPIRED, CLOCK = "stranger", "other-network", "expired", "clock"
INVITE_EXPIRED, INVITE_USED, FORBIDDEN = "invite-expired", "invite-used", "forbidden"
CODES: Final = (STRANGER, OTHER_NETWORK, EXPIRED, CLOCK, INVITE_EXPIRED, INVITE_USED, FORBIDDEN)

MAX_CHAIN: Final = 3  # certificates: founder -> inviter -> inviter -> member
MAX_LINKS: Final = 8  # of a chain: certificates, and records of keys that were succeeded
MAX_NETWORK_BYTES: Final = 4096  # bytes of a signed network record
MAX_CERTIFICATE_BYTES: Final = 640  # bytes of a signed certificate; ours have about 300
MAX_WITHDRAWAL_BYTES: Final = 4096  # bytes of a signed withdrawal; chain and reason inside
MAX_PROOFS: Final = 4  # withdrawals in one Refused: of every peer of a chain, by a signer or two
MAX_RENEWAL_BYTES: Final = 4096  # bytes of a signed renewal; a chain inside
MAX_SECRETS: Final = 16  # of one network that a node remembers; a member that has missed more needs a new ticket
MAX_MESSAGE_BYTES: Final = 64 * 1024  # bytes; a Roster of 24 longest chains fits, and one gossip message carries it
MAX_CLOCK_MS: Final = 600_000  # clocks that differ by more can't agree on what has expired
HELLO_S: Final = 5.0  # from the connection to the last Welcome

CONSENT_BYTES: Final = 64  # an Ed25519 signature
NONCE_BYTES: Final = 16
PROOF_BYTES: Final = 32  # HMAC-SHA256
SECRET_BYTES: Final = 32  # the network secret
SECRET_ID_BYTES: Final = 8  # tell the secrets of one network apart
INVITE_BYTES: Final = 16  # id of an invite
INVITE_SECRET_BYTES: Final = 16  # 128 bits: can't be guessed over the wire
SEALED_BYTES: Final = 24 + 16 + SECRET_BYTES  # SecretBox: nonce, tag, network secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Who may vouch for members. Signed by one of the founders; its id is a hash of founders and nonce."""

    name: str = at(1, limit=64)  # for people
    nonce: bytes = at(2, size=NONCE_BYTES)
    founders: tuple[bytes, ...] = at(3, limit=8, size=32)  # Ed25519 public keys, sorted
    created_ms: int = at(4)  # UTC milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A peer is a member with these roles, says the signer (a founder, or the inviter before it in the chain)."""

    network: str = at(1, limit=32)
    peer: str = at(2, limit=64)
    roles: tuple[str, ...] = at(3, limit=8)  # in the order of ROLES
    issued_ms: int = at(4)  # UTC milliseconds
    expires_ms: int = at(5, default=0)  # UTC milliseconds; 0: never
    serial: int = at(6, default=0)  # counts the certificates of one signer


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawal:
    """A peer's certificates issued up to `issued_ms` give at most the roles it `keeps`; none: it is out."""

    network: str = at(1, limit=32)
    peer: str = at(2, limit=64)
    keeps: tuple[str, ...] = at(3, limit=8)
    issued_ms: int = at(4)  # UTC milliseconds
    reason: str = at(5, limit=200)
    chain: tuple[bytes, ...] = at(6, limit=MAX_LINKS, default=())  # of the signer; empty for a founder


@dataclass(frozen=True, slots=True, kw_only=True)
class Succession:
    """The signer's key, a member's or a founder's, hands its place over to another one."""

    network: str = at(1, limit=32)
    successor: str = at(2, limit=64)  # peer id of the new key
    issued_ms: int = at(3)  # UTC milliseconds
    consent: bytes = at(4, size=CONSENT_BYTES)  # of the new key, see `succession.py`


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """The network has a new secret, says a founder's key, or a founder's device that may invite."""

    network: str = at(1, limit=32)
    issued_ms: int = at(2)  # UTC milliseconds
    digest: bytes = at(3, size=32)  # of the secret, see `renewal.py`
    chain: tuple[bytes, ...] = at(4, limit=MAX_LINKS, default=())  # of the signer; empty for a founder


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Certificates from one signed by a founder to the member's own, with the successions of keys between them."""

    certificates: tuple[bytes, ...] = at(1, limit=MAX_LINKS)  # signed records


@message(tag=1)
@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message of each side. The answerer's carries its proof, for it has seen both nonces."""

    network: str = at(1, limit=32)
    nonce: bytes = at(2, size=NONCE_BYTES)
    chain: tuple[bytes, ...] = at(3, limit=MAX_LINKS)
    software: str = at(4, limit=32)
    name: str = at(5, limit=64)
    wall_ms: int = at(6)  # the sender's clock, UTC milliseconds
    proof: bytes | None = at(7, size=PROOF_BYTES, default=None)
    secrets: tuple[bytes, ...] = at(8, limit=MAX_SECRETS, size=SECRET_ID_BYTES)  # known to the sender, newest first


@message(tag=2)
@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """You are admitted. The asker's carries its proof."""

    wall_ms: int = at(1)
    proof: bytes | None = at(2, size=PROOF_BYTES, default=None)


@message(tag=3)
@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """No, and why: a sentence that the people on both sides can act on."""

    code: str = at(1, limit=32)
    reason: str = at(2, limit=500)
    withdrawals: tuple[bytes, ...] = at(3, limit=MAX_PROOFS, default=())  # signed records that put the reader out


@message(tag=4)
@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """First message of a peer that holds a ticket."""

    network: str = at(1, limit=32)
    invite: bytes = at(2, size=INVITE_BYTES)
    secret: bytes = at(3, size=INVITE_SECRET_BYTES)
    name: str = at(4, limit=64)
    software: str = at(5, limit=32)
    wall_ms: int = at(6)


@message(tag=5)
@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """The answer to a Join: everything a member needs."""

    network: bytes = at(1, limit=MAX_NETWORK_BYTES)  # signed record
    chain: tuple[bytes, ...] = at(2, limit=MAX_LINKS)  # ends with the joiner's certificate
    sealed: bytes = at(3, size=SEALED_BYTES)  # the network secret, see `sealing.py`
    wall_ms: int = at(4)
    renewal: bytes = at(5, limit=MAX_RENEWAL_BYTES, default=b"")  # signed record of that secret; empty for the first


@message(tag=6)
@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """After both Welcomes, and by gossip: members and withdrawals that the sender knows."""

    members: tuple[Chain, ...] = at(1, limit=48, default=())
    withdrawals: tuple[bytes, ...] = at(2, limit=16, default=())  # signed records


@message(tag=7)
@dataclass(frozen=True, slots=True, kw_only=True)
class NewSecret:
    """After both Welcomes, to a member that does not know the present secret of the network yet."""

    renewal: bytes = at(1, limit=MAX_RENEWAL_BYTES)  # signed record
    secret: bytes = at(2, size=SECRET_BYTES)


Message = Hello | Welcome | Refused | Join | Granted | Roster | NewSecret
HELLO: Final[Union[Message]] = Union(
    PROTOCOL, Hello, Welcome, Refused, Join, Granted, Roster, NewSecret, limit=MAX_MESSAGE_BYTES
)


def printable(text: str) -> str:
    """Text of a peer, safe on a terminal: characters that can't be shown become a middle dot."""
    return "".join(c if c.isprintable() else "·" for c in text)
