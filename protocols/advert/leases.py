"""How long a record is believed. Times are seconds of our monotonic clock: no wall clock has to be right."""

from __future__ import annotations

from math import inf
from typing import Final

from protocols.advert.messages import HEAD, LEASE_MS, LEASE_PER_NODE_MS, MAX_LEASE_MS, Advert, Announcement
from protocols.notice.messages import HOLDS_S, Notice

LEASE_S: Final = LEASE_MS / 1000
SUSPECT_S: Final = 2.0  # a peer that disconnected is dead after this, unless somebody relays a newer advert
HEARSAY_S: Final = 10.0  # between two losses of one peer that are believed on the word of others


def lease_ms(nodes: int) -> int:
    """The lease of adverts in a mesh of so many nodes; milliseconds."""
    return min(MAX_LEASE_MS, max(LEASE_MS, nodes * LEASE_PER_NODE_MS))


def end_of(body: Advert | Announcement | Notice, since: float) -> float:
    """When a record ends whose version was new at `since`; infinite for an announcement."""
    match body:
        case Advert():
            return since + body.lease_ms / 1000
        case Announcement():
            return inf
        case Notice():
            return since + HOLDS_S


def end_of_suspect(end: float, now: float) -> float:
    """When the lease of an advert ends whose peer has lost its last connection to us now."""
    return min(end, now + SUSPECT_S)


def age_of(domain: str, since: float, now: float) -> float:
    """Seconds by which the lease is shorter for whoever gets the record from us now."""
    return 0.0 if domain == HEAD else max(0.0, now - since)
