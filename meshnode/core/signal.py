"""One thing that changes, and tasks that wait for its next change."""

from __future__ import annotations

import trio


class Changes:
    """Counts the changes of something. Whoever read it at a version waits for the next one without missing any."""

    def __init__(self) -> None:
        self._version = 0
        self._event = trio.Event()

    @property
    def version(self) -> int:
        """Goes up with every change."""
        return self._version

    def notify(self) -> None:
        """It changed."""
        self._version += 1
        self._event.set()
        self._event = trio.Event()

    async def wait(self, version: int | None = None) -> int:
        """Wait until `version` (None: the present one) is outdated; the present version.

        With the version from before you read, no change is missed. If cancelled: nothing happened.
        """
        seen = self._version if version is None else version
        while self._version == seen:
            await self._event.wait()
        return self._version
