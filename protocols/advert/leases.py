"""How long a record is believed. Times are seconds of our monotonic clock: no wall clock has to be right."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Final

from protocols.advert.messages import ADVERT, HEAD

LEASE_MS: Final = 12_000  # an advert that is not renewed for this long (receiver's clock) is dead
LEASE_S: Final = LEASE_MS / 1000
SUSPECT_S: Final = 3.0  # a peer that disconnected is dead after this, unless somebody relays a newer advert

_LEASES_S: Final[Mapping[str, float]] = {ADVERT: LEASE_S, HEAD: inf}


def end_of(domain: str, since: float) -> float:
    """When the lease of a record ends whose version was new at `since`; infinite for an announcement."""
    return since + _LEASES_S[domain]


def end_of_suspect(end: float, now: float) -> float:
    """When the lease of an advert ends whose peer has lost its last connection to us now."""
    return min(end, now + SUSPECT_S)


def age_of(domain: str, since: float, now: float) -> float:
    """Seconds by which the lease is shorter for whoever gets the record from us now."""
    return 0.0 if domain == HEAD else max(0.0, now - since)
