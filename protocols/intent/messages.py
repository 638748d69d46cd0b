"""Messages of /meshnode/intent/1: a peer is asked to keep layers while the asker leaves them. See SPEC.md.

The intent itself travels in the adverts (`Serving.target`, `epoch`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.codec import Union, at, message

PROTOCOL: Final = "/meshnode/intent/1"
MAX_MESSAGE_BYTES: Final = 4096
HOLD_MS: Final = 30_000  # how long a promise lasts; longer than a lease, so the holder knows of the move by then


@message(tag=1)
@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Asker -> server of the same layers: stay with layers [first, last) for a while, I leave them."""

    manifest: str = at(1, limit=64)
    variant: str = at(2, limit=32)
    first: int = at(3, high=1024)
    last: int = at(4, high=1024)
    epoch: int = at(5)  # of the asker's intent
    hold_ms: int = at(6, high=300_000)
    returns: bool = at(7, default=False)  # the asker serves these layers again in a moment


@message(tag=2)
@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Promised: the server does not leave these layers of its own will for `hold_ms`."""

    hold_ms: int = at(1, high=300_000)


@message(tag=3)
@dataclass(frozen=True, slots=True, kw_only=True)
class NotHeld:
    """No, and why. Nothing was promised."""

    code: str = at(1, limit=32)  # "fenced" (does not serve them), "moving", "leaving"
    reason: str = at(2, limit=500)


Answer = Held | NotHeld
HOLDS: Final[Union[Hold | Held | NotHeld]] = Union(PROTOCOL, Hold, Held, NotHeld, limit=MAX_MESSAGE_BYTES)
