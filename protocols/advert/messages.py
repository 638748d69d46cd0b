"""What a node says about itself (Advert) and which model the network serves (Announcement). See SPEC.md.

Both travel as signed records of the domains "advert" and "head". One writer per record; the higher
(incarnation, sequence) wins, so the view of the mesh is a state-based CRDT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.codec import at

ADVERT: Final = "advert"
HEAD: Final = "head"
LOSS: Final = "loss"

MAX_TROUBLE: Final = 240  # characters
LEASE_MS: Final = 16_000  # least lease of an advert
MAX_LEASE_MS: Final = 900_000
LEASE_PER_NODE_MS: Final = 8_000  # of the lease, for each node of the mesh: so all together renew as often as ever
RENEWALS: Final = 4  # in the time of a lease

# States of a served span. IDLE: no span. INTENT: announced. LOADING: fetching and opening.
# SERVING: answers steps. DRAINING: no new sessions, leaving in good order.
IDLE, INTENT, LOADING, SERVING, DRAINING = "idle", "intent", "loading", "serving", "draining"
STATES: Final = (IDLE, INTENT, LOADING, SERVING, DRAINING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Layers [first, last) of one variant of one manifest."""

    manifest: str = at(1, limit=64)
    variant: str = at(2, limit=32)
    first: int = at(3, high=1024)
    last: int = at(4, high=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What the node serves, or means to. `span` is what it serves now (routes may use it in SERVING);
    `target` is the span it announced to move to (the intent), with the epoch that ranks competing intents."""

    state: str = at(1, limit=16)
    span: Span | None = at(2)
    target: Span | None = at(3)
    epoch: int = at(4, default=0)  # counts the node's intents
    decode_us: int = at(5, default=0)  # measured: one-row step through the span
    sessions: int = at(6, default=0)  # open sessions
    max_sessions: int = at(7, default=0)
    queue_us: int = at(8, default=0)  # moving average of the wait for the engine
    ready: bool = at(9, default=False)  # the target is open beside the span, and served when all of its release is


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTrip:
    """A link, as measured by the advertiser's heartbeat."""

    peer: str = at(1, limit=64)
    us: int = at(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Files of a manifest that the node has on disk and serves to members."""

    manifest: str = at(1, limit=64)
    cids: tuple[bytes, ...] = at(2, limit=1024)  # binary CIDs (36 bytes), sorted


@dataclass(frozen=True, slots=True, kw_only=True)
class Advert:
    peer: str = at(1, limit=64)
    incarnation: int = at(2)  # start of the node, UTC milliseconds, or since when it outbids another one with its key
    sequence: int = at(3)
    name: str = at(4, limit=64)  # for people
    addresses: tuple[str, ...] = at(5, limit=16)
    leaving: bool = at(6, default=False)  # said goodbye: not to be planned with
    memory_bytes: int = at(7, default=0)  # it gives this much to serving (weights and KV); 0: serves nothing
    disk_free_bytes: int = at(8, default=0)  # what it could add to its files, by its quota and its disk
    max_layers: int = at(9, default=0)  # 0: only memory limits it
    tags: tuple[str, ...] = at(10, limit=16, default=())  # "cpu", "gpu", "mains", "battery", ...
    layer_decode_us: int = at(11, default=0)  # measured microseconds per layer, one row; 0: not measured yet
    layer_prefill_us: int = at(12, default=0)  # per layer and row of a 64-row step
    serving: Serving | None = at(13)
    holdings: tuple[Holding, ...] = at(14, limit=16, default=())
    round_trips: tuple[RoundTrip, ...] = at(15, limit=64, default=())
    trouble: str = at(16, limit=MAX_TROUBLE, default="")  # why the node does not serve what it should, for people
    contested: bool = at(17, default=False)  # another node signs with the same key: not to be planned with
    lease_ms: int = at(18, low=LEASE_MS, high=MAX_LEASE_MS, default=LEASE_MS)  # it is dead that long after this


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A witness's word: its connection to another node broke, and this is the newest advert that it has of it."""

    peer: str = at(1, limit=64)  # the witness, the signer of the record
    lost: str = at(2, limit=64)
    incarnation: int = at(3)
    sequence: int = at(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A publisher's word: the network serves this release. Does not expire; the word of a founder's device goes
    before a member's, then the newest one wins (created_ms, then the lower manifest CID)."""

    peer: str = at(1, limit=64)  # the publisher, the signer of the record
    incarnation: int = at(2)  # UTC milliseconds of about when it was written, like `created_ms`
    sequence: int = at(3)
    created_ms: int = at(4)
    name: str = at(5, limit=64)
    version: str = at(6, limit=32)
    manifest: str = at(7, limit=64)
    variant: str = at(8, limit=32)
    retired: bool = at(9, default=False)  # taken back
