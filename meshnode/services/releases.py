"""Which release the network serves: announced, fetched, checked; and one that waits to be announced.

An announcement changes nothing before its manifest is here: one that names what nobody has stops no node.
A release can be added by the CID of its manifest alone. It waits in the node's state until the manifest has come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import trio

from meshnode.core.errors import ContentUnavailable, Declined, FatalError, TransientError
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.model.fit import facts_of
from meshnode.model.release import ServedRelease
from meshnode.services.port import Content, Directory
from meshnode.state import releases
from meshnode.state.port import Records
from protocols.advert.messages import Announcement
from protocols.backoff import Backoff
from protocols.errors import ProtocolError, RemoteProtocolError
from protocols.ids import Cid, short
from protocols.manifest.codec import open_manifest
from protocols.manifest.messages import Manifest

SEARCH_PAUSE_S: Final = (1.0, 60.0)  # after a search that found nothing: first, cap. It takes half a minute itself.
MAX_SOUGHT: Final = 4  # announcements whose manifests are looked for at the same time, first in rank
FETCH_PAUSE_S: Final = (0.5, 30.0)  # after the manifest of an announcement did not come: first, cap

_log = get_logger("releases")


class Blocks(Protocol):
    """Where manifests are."""

    def block(self, cid: Cid) -> bytes | None: ...


class Shown(Protocol):
    """Says what this node has of the served release."""

    def serve(self, release: tuple[Cid, str] | None) -> None:
        """This release (manifest, variant) is served from now on, whatever is announced."""


class ReleasesService:
    """Implements `Releases` of services/port.py."""

    name = "releases"

    def __init__(
        self,
        directory: Directory,
        content: Content,
        blocks: Blocks,
        state: Records,
        inventory: Shown,
        health: Health,
    ) -> None:
        """`blocks`: the store that `content` fetches into. `inventory` learns what is served."""
        self._directory = directory
        self._content = content
        self._blocks = blocks
        self._state = state
        self._health = health
        self._changes = Changes()
        self._inventory = inventory
        self._current: ServedRelease | None = None
        self._previous: ServedRelease | None = None
        self._before: tuple[str, ServedRelease] | None = None  # served now, or last; and the publisher that said so
        self._sought: set[tuple[str, str]] = set()

    @property
    def current(self) -> ServedRelease | None:
        return self._current

    @property
    def previous(self) -> ServedRelease | None:
        return self._previous

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
        if releases.known(self._state):
            return (
                "the network serves no model; `meshnode model list` shows those of this node, `meshnode model serve "
                "NAME` has one served"
            )
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
        if variant not in release.servable:
            raise Declined(
                "no-model",
                f"the variant {variant} of {release.name} is for training and can't be served; choose "
                f"{' or '.join(release.servable)}",
            )
        self._directory.announce(name=release.name, version=release.version, manifest=manifest, variant=variant)
        releases.wait_no_longer(self._state)

    def retract(self) -> None:
        """Take back our word about which release is served: that of others counts again.

        Nothing happens when there is none. Raises Declined `forbidden`.
        """
        mine = next((one for one in self._directory.ranked() if one.peer == self._directory.me().peer), None)
        if mine is not None:
            self._directory.announce(
                name=mine.name,
                version=mine.version,
                manifest=Cid(mine.manifest),
                variant=mine.variant,
                retired=True,
            )
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
        self._restore()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._bring_in)
            task_status.started()
            while True:
                version = self._directory.changes.version
                self._choose(nursery)
                await self._directory.changes.wait(version)

    def _restore(self) -> None:
        """What was served when this node ran last: its publisher may have announced something else since."""
        before = releases.served(self._state)
        if before is not None:
            publisher, cid, variant = before
            release = self._open_here(cid, variant)
            self._before = None if release is None else (publisher, release)

    def _choose(self, nursery: trio.Nursery) -> None:
        """Serve the first announcement whose manifest is here. Those before it are sought.

        While the very first is sought, what was served goes on, as long as its publisher still has a word.
        """
        ranked = self._directory.ranked()
        found: tuple[str, ServedRelease] | None = None
        for announced in ranked[:MAX_SOUGHT]:
            release = self._here(announced)
            if release is not None:
                found = (announced.peer, release)
                break
            if _names(announced) not in self._sought:
                self._sought.add(_names(announced))
                nursery.start_soon(self._seek, announced, nursery)
        before = self._before
        is_first = found is not None and found[0] == ranked[0].peer
        if before is not None and not is_first and any(announced.peer == before[0] for announced in ranked):
            found = before
        self._become(found)
        self._report(ranked)

    def _become(self, found: tuple[str, ServedRelease] | None) -> None:
        release = None if found is None else found[1]
        if found is not None and found != self._before:
            publisher, now = found
            releases.remember(self._state, now.cid, now.variant_name)  # for `meshnode model list`
            releases.set_served(self._state, publisher, now.cid, now.variant_name)
            self._before = found
        if release != self._current:
            self._previous, self._current = self._current if release is not None else None, release
            self._inventory.serve(None if release is None else (release.cid, release.variant_name))
            self._changes.notify()

    def _report(self, ranked: Sequence[Announcement]) -> None:
        """Say what is served instead of what was announced."""
        if self._current is None or not ranked or _names(ranked[0]) == _names_of(self._current):
            self._health.clear("release-missing")
            return
        self._health.set(
            "release-missing",
            announced=f"{ranked[0].name} {ranked[0].version}",
            peer=short(ranked[0].peer),
            served=self._current.title,
        )

    def _here(self, announced: Announcement) -> ServedRelease | None:
        """The release, if its manifest is in our store and holds."""
        if self._current is not None and _names(announced) == _names_of(self._current):
            return self._current
        return self._open_here(Cid(announced.manifest), announced.variant)

    def _open_here(self, cid: Cid, variant: str) -> ServedRelease | None:
        block = self._blocks.block(cid)
        if block is None:
            return None
        try:
            manifest = open_manifest(block)
            if variant not in manifest.servable:
                raise RemoteProtocolError(f"{manifest.name} has no variant {variant[:40]} that can be served")
            return ServedRelease(cid, variant, manifest, facts_of(manifest, variant))
        except (ProtocolError, KeyError) as error:
            _log.error("manifest.refused", cid=cid, variant=variant, reason=str(error))
            return None

    async def _seek(self, announced: Announcement, nursery: trio.Nursery) -> None:
        """Fetch a manifest, again and again until it is here or is not announced any more."""
        backoff = Backoff(*FETCH_PAUSE_S)
        while any(_names(one) == _names(announced) for one in self._directory.ranked()[:MAX_SOUGHT]):
            try:
                await self._content.block(Cid(announced.manifest))
            except (TransientError, Declined, FatalError, ProtocolError) as error:
                _log.warning("manifest.missing", cid=announced.manifest, reason=str(error))
            else:
                if self._here(announced) is not None:
                    break
            await trio.sleep(backoff.next())
        self._sought.discard(_names(announced))
        self._choose(nursery)

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
                    self._health.set("model-refused", manifest=waiting[0], reason=str(error))
                    releases.wait_no_longer(self._state)
        self._health.clear("manifest-missing")


def _names(announced: Announcement) -> tuple[str, str]:
    """What makes a release another one."""
    return announced.manifest, announced.variant


def _names_of(release: ServedRelease) -> tuple[str, str]:
    return release.cid, release.variant_name
