"""The table of all routes, as the app, the keys, the metrics and the OpenAPI document read it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Way:
    """One route."""

    method: str
    path: str  # "/v1/models/{name}"
    scope: str  # that a key needs; empty: none
    says: str  # one line for people
    handler: Handler
    needs: Sequence[str] = ()  # fields that its body must have
    gives: str = "application/json"

    @property
    def audited(self) -> bool:
        """Whether a request is worth a line in the audit log: it asks, changes or reads what somebody has asked."""
        return bool(self.scope) and (self.method != "GET" or "{id}" in self.path)
