"""How the sessions and the KV memory of a stage are shared among the nodes that ask it.

Whoever asks first must not be able to take everything. An origin may hold more than its share only while enough stays
free for others; the first session of an origin is always taken while there is room. A session of a few tokens is a
probe: probes have rooms of their own, so that a full stage still shows that it works.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from protocols.ids import PeerId

PROBE_TOKENS: Final = 4  # a session of no more than so many tokens, prompt included, is a probe
PROBE_SESSIONS: Final = 128  # probes at once, beside the sessions; one of each origin: a whole mesh may probe at once
SILENT_S: Final = 15.0  # a session without a step for so long goes when its room is needed
SPARE_KV: Final = 8  # one part in so many of the KV memory stays free for newcomers


@dataclass(frozen=True, slots=True)
class Held:
    """A session that is open."""

    origin: PeerId
    capacity: int  # tokens
    kv_bytes: int
    silent_s: float  # since its last step, 0 while one waits or runs

    @property
    def probe(self) -> bool:
        return self.capacity <= PROBE_TOKENS


@dataclass(frozen=True, slots=True)
class Room:
    """What a stage has, probes aside."""

    sessions: int
    kv_bytes: int


def why_refused(wanted: Held, held: Collection[Held], room: Room) -> str:
    """Why a further session can't be opened, for its origin; empty when it can."""
    if wanted.probe:
        probes = [other for other in held if other.probe]
        if any(probe.origin == wanted.origin for probe in probes) or len(probes) >= PROBE_SESSIONS:
            return f"{len(probes)} probes run there at the moment; {PROBE_SESSIONS} are possible, one of each node"
        return ""
    others = [other for other in held if not other.probe]
    if len(others) >= room.sessions:
        return f"all {room.sessions} sessions are taken"
    mine = [other for other in others if other.origin == wanted.origin]
    if not mine:
        return ""  # whether its keys and values fit is the engine's word
    askers = len({other.origin for other in others})
    share, spare = -(-room.sessions // askers), min(2, room.sessions // 4)
    if len(mine) >= share or len(others) >= room.sessions - spare:
        return f"{len(mine)} of {room.sessions} sessions are yours already; the rest is kept for others"
    free = room.kv_bytes - sum(other.kv_bytes for other in others) - wanted.kv_bytes
    yours = sum(other.kv_bytes for other in mine) + wanted.kv_bytes
    if yours * askers > room.kv_bytes or free < room.kv_bytes // SPARE_KV:
        return "your sessions hold their share of the memory for keys and values; the rest is kept for others"
    return ""


def victim(wanted: Held, held: Collection[Held]) -> Held | None:
    """The silent session that goes for the first one of an origin: of whoever holds most, the longest silent one."""
    if wanted.probe or any(other.origin == wanted.origin and not other.probe for other in held):
        return None
    count = {origin: sum(other.origin == origin for other in held) for origin in {other.origin for other in held}}
    silent = [other for other in held if not other.probe and other.silent_s >= SILENT_S]
    return max(silent, key=lambda other: (count[other.origin], other.silent_s), default=None)
