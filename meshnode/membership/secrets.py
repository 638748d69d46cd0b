"""The network's secrets that outlive a restart: what we entered with, and what came since, in the state file."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from meshnode.membership.port import Membership
from meshnode.state.port import Records
from protocols.codec import at, decode, encode
from protocols.errors import RemoteProtocolError
from protocols.membership import Secret, Secrets, Trust
from protocols.membership.messages import MAX_RENEWAL_BYTES, SECRET_BYTES
from protocols.membership.renewal import open_renewal

_KIND: Final = "secret"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    secret: bytes = at(1, size=SECRET_BYTES)
    renewal: bytes = at(2, limit=MAX_RENEWAL_BYTES)


def known_secrets(membership: Membership, records: Records, wall_ms: int, known: Secrets | None = None) -> Secrets:
    """Every secret of the network that is known: with `known`, those of the state file are added to these."""
    trust = membership.trust()  # who signed may have been put out since; the secret is the present one all the same
    found: list[Secret] = list(known.all) if known is not None else [_first(membership, trust, wall_ms)]
    here = {secret.id for secret in found}
    for data in records.records(_KIND).values():
        with suppress(RemoteProtocolError):  # dated by a clock that was wrong, or of a founder who is none any more
            kept = decode(_Kept, data)
            secret = Secret(kept.secret)
            if secret.id not in here:
                found.append(open_renewal(kept.renewal, kept.secret, trust, wall_ms))
    return Secrets(found)


def _first(membership: Membership, trust: Trust, wall_ms: int) -> Secret:
    """What we entered with; without its record it is older than all others."""
    with suppress(RemoteProtocolError):
        if membership.renewal:
            return open_renewal(membership.renewal, membership.secret, trust, wall_ms)
    return Secret(membership.secret)


def keep_secrets(records: Records, secrets: Secrets) -> None:
    """Keep those that have a record; the others are forgotten."""
    kept = {one.id.hex(): one for one in secrets.all if one.renewal}
    for name in _gone(records.records(_KIND), kept):
        records.remove_record(_KIND, name)
    for name, one in kept.items():
        records.put_record(_KIND, name, encode(_Kept(secret=one.secret, renewal=one.renewal)))


def _gone(before: Iterable[str], now: Iterable[str]) -> list[str]:
    return sorted(set(before) - set(now))
