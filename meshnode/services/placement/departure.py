"""What keeps this node at its layers: promises that it has given, and those that it needs from others."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from meshnode.model.fit import Range
from meshnode.model.release import ServedRelease
from meshnode.policy.guards import abandoned, guards_of
from meshnode.policy.placement import Node
from meshnode.services.port import Holds
from protocols.ids import PeerId, short
from protocols.intent.machine import Keeper
from protocols.words import layers


class Departure:
    """Asked before layers are left."""

    def __init__(self, us: PeerId, keeper: Keeper, holds: Holds) -> None:
        self._us = us
        self._keeper = keeper
        self._holds = holds

    def bound(self, leaving: Sequence[Range]) -> str:
        """Which promise keeps us from leaving these layers; empty: none."""
        now = trio.current_time()
        holder = next((peer for part in leaving if (peer := self._keeper.promised(*part, now))), None)
        return "" if holder is None else f"this node promised {short(holder)} to stay"

    async def promises(
        self, release: ServedRelease, nodes: Sequence[Node], source: Range, to: Range, *, exclusive: bool, epoch: int
    ) -> str | None:
        """Get a promise for every layer that we leave. None, or why there is none.

        exclusive: the old layers go before the new ones are there. epoch: of our intent.
        """
        if why_not := self.bound(abandoned(source, to, exclusive=exclusive)):
            return why_not
        guards = guards_of(nodes, self._us, source, to, exclusive=exclusive)
        if guards.missing:
            return f"nobody else keeps {layers(*guards.missing[0])}"
        return await self._holds.keep(release, guards.holders, epoch)
