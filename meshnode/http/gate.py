"""Who may ask: keys, and what keeps web pages of others from asking a node on the reader's own machine."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request

from meshnode.core.clock import Monotonic, Wall
from meshnode.http.listen import is_loopback
from meshnode.http.problems import Problem
from meshnode.http.quotas import Quotas
from meshnode.state.api_keys import ApiKey, find_key
from meshnode.state.port import Records

OPEN: Final = ""  # the scope of what everybody may ask

NO_KEY: Final = (
    "this node asks for a key: send one as `Authorization: Bearer mn-...` or as x-api-key. `meshnode key add NAME` "
    "on the node makes one"
)
WRONG_KEY: Final = "this node has no such key, or it was revoked, or it has expired: `meshnode key list` on the node"


class Gate:
    """Checks every request before anything is read or computed for it."""

    def __init__(
        self, state: Records, wall: Wall, clock: Monotonic, *, keyed: bool, origins: Collection[str] = ()
    ) -> None:
        """
        Args:
          keyed: whether a key is needed; without, only this machine can reach us.
          origins: of web pages that may ask, "https://chat.example".
        """
        self._state = state
        self._wall = wall
        self._clock = clock
        self._keyed = keyed
        self._origins = frozenset(origins)
        self._quotas = Quotas()

    def check_origin(self, request: Request) -> str | None:
        """The origin of another web page that may read the answer. Raises Problem 403 for one that may not.

        Without keys the name in the address must be this machine's, too: a page may have its own name point to
        127.0.0.1 (DNS rebinding).
        """
        host = request.headers.get("host", "")
        if not self._keyed and not is_loopback(urlsplit(f"//{host}").hostname or "localhost"):
            raise Problem(403, "forbidden", f"this node is no {host[:80]!r}; ask it as localhost or 127.0.0.1")
        origin = request.headers.get("origin")
        if origin is None or origin in (f"http://{host}", f"https://{host}"):
            return None
        if origin not in self._origins:
            raise Problem(
                403, "forbidden", f"pages of {origin[:80]!r} may not ask this node; http.cors names those that may"
            )
        return origin

    def admit(self, request: Request, scope: str) -> ApiKey | None:
        """The key that a request is made with; None where none is needed. Raises Problem 401, 403, 429."""
        if not self._keyed or scope == OPEN:
            return None
        key = find_key(self._state, _shown(request), self._wall())
        if key is None:
            raise Problem(401, "invalid_api_key", WRONG_KEY if _shown(request) else NO_KEY)
        if not key.may(scope):
            raise Problem(403, "forbidden", f"the key {key.name} may not do that: it lacks the scope {scope}")
        self._quotas.take(key, self._clock())
        return key

    def spend(self, key: ApiKey | None, tokens: int) -> None:
        """What an answer has cost its key."""
        if key is not None:
            self._quotas.spend(key, tokens)


def _shown(request: Request) -> str:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key", "")
