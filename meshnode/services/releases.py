"""Which release the network serves: announced, fetched, checked; and one that waits to be announced.

A release can be added by the CID of its manifest alone. It waits in the node's state until the manifest has come.
"""

from __future__ import annotations

from typing import Final, Protocol

import trio

from meshnode.core.errors import ContentUnavailable, Declined, FatalError, TransientError
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.model.facts import facts_of
from meshnode.model.release import ServedRelease
from meshnode.services.port import Content, Directory
from meshnode.state import releases
from meshnode.state.port import Records
from protocols.advert.messages import Announcement
from protocols.backoff import Backoff
from protocols.errors import ProtocolError, RemoteProtocolError
from protocols.ids import Cid
from protocols.manifest.codec import open_manifest
from protocols.manifest.messages import Manifest

SEARCH_PAUSE_S: Final = (1.0, 60.0)  # after a search that found nothing: first, cap. It takes half a minute itself.
FETCH_PAUSE_S: Final = (0.5, 30.0)  # after the manifest of an announcement did not come: first, cap

_log = get_logger("releases")


class Blocks(Protocol):
    """Where manifests are."""

    def block(self, cid: Cid) -> bytes | None: ...


class ReleasesService:
    """Implements `Releases` of services/port.py."""

    name = "releases"

    def __init__(
        self, directory: Directory, content: Content, blocks: Blocks, state: Records, health: Health
    ) -> None:
        """`blocks`: the store that `content` fetches into."""
        self._directory = directory
        self._content = content
        self._blocks = blocks
        self._state = state
        self._health = health
        self._changes = Changes()
        self._current: ServedRelease | None = None

    @property
    def current(self) -> ServedRelease | None:
        return self._current

    @property
    def changes(self) -> Changes:
        return self._changes

    @property
    def awaited(self) -> Cid | None:
        """The manifest of a release that was added by its CID and has not come yet."""
        waiting = releases.waiting(self._state)
        return None if waiting is None else waiting[0]

    @property
    def why_none(self) -> str:
        """While `current` is None: what is missing, in a sentence."""
        announced = self._directory.announcement()
        if announced is not None:
            return f"the description of the model {announced.name} has not arrived yet"
        if (manifest := self.awaited) is not None:
            return f"the manifest {manifest} of the model that was added here has not arrived yet"
        return "the network serves no model yet; add one with: meshnode model add PATH"

    def announce(self, manifest: Cid, variant: str) -> None:
        """Say that the network serves this release from now on. Its manifest must be in our store.

        Args:
          variant: empty for the smallest one.

        Raises Declined `forbidden` or `no-model`.
        """
        release = self._open(manifest)
        variant = variant or release.smallest_variant()
        if variant not in release.variants:
            raise Declined(
                "no-model", f"{release.name} has no variant {variant}; it has {', '.join(release.variants)}"
            )
        self._directory.announce(name=release.name, version=release.version, manifest=manifest, variant=variant)
        releases.wait_no_longer(self._state)

    def _open(self, manifest: Cid) -> Manifest:
        block = self._blocks.block(manifest)
        if block is None:
            raise Declined("no-model", f"the manifest {manifest} is not in this node's store")
        try:
            return open_manifest(block)
        except RemoteProtocolError as error:
            raise Declined("no-model", f"the manifest {manifest} does not hold: {error}") from error

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the announcements until cancelled. What waits then waits for the next start of the node."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._bring_in)
            task_status.started()
            announced: Announcement | None = None
            while True:
                version = self._directory.changes.version
                newest = self._directory.announcement()
                if _names(newest) != _names(announced):
                    announced = newest
                    self._become(None if announced is None else self._here(announced))
                    if announced is not None and self._current is None:
                        nursery.start_soon(self._learn, announced)
                await self._directory.changes.wait(version)

    def _become(self, release: ServedRelease | None) -> None:
        if release is not None:
            releases.remember(self._state, release.cid, release.variant_name)  # for `meshnode model list`
        if release != self._current:
            self._current = release
            self._changes.notify()

    def _here(self, announced: Announcement) -> ServedRelease | None:
        """The release, if its manifest is in our store and holds."""
        cid, variant = Cid(announced.manifest), announced.variant
        block = self._blocks.block(cid)
        if block is None:
            return None
        try:
            manifest = open_manifest(block)
            return ServedRelease(cid, variant, manifest, facts_of(manifest, variant))
        except (ProtocolError, KeyError) as error:
            _log.error("manifest.refused", cid=cid, variant=variant, reason=str(error))
            return None

    async def _learn(self, announced: Announcement) -> None:
        """Fetch the manifest, again and again until it is here or something else is announced."""
        backoff = Backoff(*FETCH_PAUSE_S)
        while self._current is None and _names(self._directory.announcement()) == _names(announced):
            try:
                await self._content.block(Cid(announced.manifest))
            except (TransientError, Declined, FatalError, ProtocolError) as error:
                _log.warning("manifest.missing", cid=announced.manifest, reason=str(error))
            else:
                release = self._here(announced)
                if release is not None and _names(self._directory.announcement()) == _names(announced):
                    self._become(release)
                    return
            await trio.sleep(backoff.next())

    async def _bring_in(self) -> None:
        """Announce what waits, once its manifest is here."""
        backoff = Backoff(*SEARCH_PAUSE_S)
        while (waiting := releases.waiting(self._state)) is not None:
            try:
                await self._content.block(waiting[0])
            except ContentUnavailable as error:
                self._health.set("manifest-missing", manifest=waiting[0], reason=str(error))
                await trio.sleep(backoff.next())
                continue
            if releases.waiting(self._state) == waiting:  # another one may have been added meanwhile
                try:
                    self.announce(*waiting)
                except Declined as error:
                    _log.warning("model.refused", manifest=waiting[0], why=str(error))
                    releases.wait_no_longer(self._state)
        self._health.clear("manifest-missing")


def _names(announced: Announcement | None) -> tuple[str, str] | None:
    """What makes a release another one."""
    return None if announced is None else (announced.manifest, announced.variant)
