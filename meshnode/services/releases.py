"""A release that was added by the CID of its manifest alone: fetched while the node runs, then served."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from meshnode.core.errors import ContentUnavailable, Declined
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from protocols.ids import Cid

FIRST_PAUSE_SECONDS: Final = 1.0  # after a search that found nothing; doubles. A search itself takes half a minute.
LAST_PAUSE_SECONDS: Final = 60.0

Waiting = tuple[Cid, str]  # manifest, variant ("": the smallest)

_log = get_logger("arrival")


class ArrivalService:
    """Has the network serve the release that waits in the node's state, once its manifest is here."""

    name = "arrival"

    def __init__(
        self,
        *,
        waiting: Callable[[], Waiting | None],
        fetch_block: Callable[[Cid], Awaitable[bytes]],
        announce: Callable[[Cid, str], None],
        forget: Callable[[], None],
        health: Health,
    ) -> None:
        """
        Args:
          waiting: what was added while no node ran on this folder, until it was announced or replaced.
          announce: has the network serve a release whose manifest is here; raises Declined.
          forget: called when it was announced or refused.
        """
        self._waiting = waiting
        self._fetch_block = fetch_block
        self._announce = announce
        self._forget = forget
        self._health = health

    @property
    def awaited(self) -> Cid | None:
        """The manifest that has not come yet."""
        waiting = self._waiting()
        return None if waiting is None else waiting[0]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch until nothing waits. If cancelled: it waits for the next start of the node."""
        task_status.started()
        pause = FIRST_PAUSE_SECONDS
        while (waiting := self._waiting()) is not None:
            try:
                await self._fetch_block(waiting[0])
            except ContentUnavailable as error:
                self._health.set("manifest-missing", manifest=waiting[0], reason=str(error))
                await trio.sleep(pause)
                pause = min(LAST_PAUSE_SECONDS, 2 * pause)
                continue
            if self._waiting() == waiting:  # another one may have been added meanwhile
                self._bring_in(*waiting)
        self._health.clear("manifest-missing")
        await trio.sleep_forever()

    def _bring_in(self, manifest: Cid, variant: str) -> None:
        try:
            self._announce(manifest, variant)
        except Declined as error:
            _log.warning("model.refused", manifest=manifest, why=str(error))
        self._forget()
