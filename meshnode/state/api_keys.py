"""Keys by which programs may ask this node over HTTP. Only hashes are kept.

A key is `mn-ID-SECRET`; the secret has 256 random bits, so one round of SHA-256 is enough: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, replace
from typing import Final

from meshnode.core.errors import ConfigError, DiskError
from meshnode.state.port import Records
from protocols.codec import at, decode, encode
from protocols.errors import RemoteProtocolError

KIND: Final = "api-key"
SCOPES: Final = ("infer", "embed", "feedback", "admin")
MAX_KEYS: Final = 1024
MAX_NAME: Final = 64
_KEY: Final = re.compile(r"mn-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """What is kept of a key. Limits of 0: none."""

    id: str = at(1, limit=12)
    name: str = at(2, limit=MAX_NAME)  # for people
    secret_hash: bytes = at(3, size=32)
    scopes: tuple[str, ...] = at(4, limit=16)
    created_ms: int = at(5)
    expires_ms: int = at(6)  # 0: never
    revoked_ms: int = at(7)  # 0: it is not
    requests_per_minute: int = at(8)
    tokens_per_day: int = at(9)  # of prompts and answers

    def may(self, scope: str) -> bool:
        """Whether it opens what needs this scope."""
        return scope in self.scopes or "admin" in self.scopes


def make_key(
    state: Records,
    name: str,
    *,
    scopes: tuple[str, ...],
    now_ms: int,
    expires_ms: int = 0,
    requests_per_minute: int = 0,
    tokens_per_day: int = 0,
) -> tuple[ApiKey, str]:
    """A new key, kept; and the text that is shown once. Raises ConfigError: there are too many."""
    if len(state.records(KIND)) >= MAX_KEYS:
        raise ConfigError(f"this node has {MAX_KEYS} keys, which is all that it keeps; forget some with: key revoke")
    secret = secrets.token_urlsafe(32)
    key = ApiKey(
        id=secrets.token_hex(6),
        name=name,
        secret_hash=hashlib.sha256(secret.encode()).digest(),
        scopes=scopes,
        created_ms=now_ms,
        expires_ms=expires_ms,
        revoked_ms=0,
        requests_per_minute=requests_per_minute,
        tokens_per_day=tokens_per_day,
    )
    state.put_record(KIND, key.id, encode(key))
    return key, f"mn-{key.id}-{secret}"


def keys(state: Records) -> tuple[ApiKey, ...]:
    """All of them, oldest first, those that are over as well. Raises DiskError: one can't be read."""
    found = (_read(id, data) for id, data in state.records(KIND).items())
    return tuple(sorted(found, key=lambda key: (key.created_ms, key.id)))


def revoke_key(state: Records, id: str, now_ms: int) -> ApiKey:
    """Make a key worthless; the node sees it with the next request. Raises ConfigError: there is none."""
    data = state.record(KIND, id)
    if data is None:
        raise ConfigError(f"this node has no key {id!r}; `meshnode key list` shows them")
    key = _read(id, data)
    if not key.revoked_ms:
        key = replace(key, revoked_ms=now_ms)
        state.put_record(KIND, id, encode(key))
    return key


def find_key(state: Records, text: str, now_ms: int) -> ApiKey | None:
    """The key that a request shows, if it is one of ours and still good."""
    match = _KEY.fullmatch(text)
    if match is None or (data := state.record(KIND, match[1])) is None:
        return None
    key = _read(match[1], data)
    right = hmac.compare_digest(key.secret_hash, hashlib.sha256(match[2].encode()).digest())
    over = key.revoked_ms or (key.expires_ms and key.expires_ms <= now_ms)
    return key if right and not over else None


def _read(id: str, data: bytes) -> ApiKey:
    try:
        return decode(ApiKey, data)
    except RemoteProtocolError as error:
        raise DiskError(f"the key {id} in the state file can't be read: {error}") from error
