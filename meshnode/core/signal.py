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


class Watch:
    """Several of them, for one task that looks anew whenever any has changed."""

    def __init__(self, *changes: Changes) -> None:
        self._changes = changes
        self._seen = [one.version for one in changes]

    async def next(self) -> None:
        """Wait until any has changed since the last time, or since this was made. If cancelled: nothing happened."""
        async with trio.open_nursery() as nursery:

            async def wait(one: Changes, version: int) -> None:
                await one.wait(version)
                nursery.cancel_scope.cancel()

            for one, version in zip(self._changes, self._seen, strict=True):
                nursery.start_soon(wait, one, version)
        self._seen = [one.version for one in self._changes]
