"""What services see of each other. A service imports this file and no other service.

Whoever implements a protocol is a service of its own folder or file; `node.py` brings them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from meshnode.core.signal import Changes
from meshnode.model.release import ServedRelease
from meshnode.store.port import OpenFile
from protocols.advert.messages import Advert, Announcement
from protocols.ids import Cid, PeerId
from protocols.manifest.messages import FileRef

Progress = Callable[[int, int], None]  # (bytes verified and written, bytes in all)


class Directory(Protocol):
    """What every node says about itself (`directory.py`)."""

    @property
    def changes(self) -> Changes:
        """Whenever a live advert says something else, somebody appears or vanishes, or an announcement changes."""

    def live(self) -> Mapping[PeerId, Advert]:
        """The newest advert of every node that is there, our own included."""

    def me(self) -> Advert:
        """Our own advert, with changes that are not published yet."""

    def advertise(self, advert: Advert) -> None:
        """Publish `dataclasses.replace(directory.me(), ...)`: within moments, a few times per second at most.

        Raises LocalProtocolError for a value that others would refuse; nothing is changed then.
        """

    def announcement(self) -> Announcement | None:
        """Which release the network is told to serve: the newest word of a publisher that is not taken back."""

    def announcements(self) -> Mapping[PeerId, Announcement]:
        """The newest announcement of every publisher, those taken back too, sorted by publisher."""

    def providers(self, cid: Cid) -> Sequence[PeerId]:
        """Peers that say they have a file or block, never ourselves; the best first."""


class Releases(Protocol):
    """Which release the network serves (`releases.py`)."""

    @property
    def changes(self) -> Changes:
        """Whenever `current` changes."""

    @property
    def current(self) -> ServedRelease | None:
        """None until an announcement and its manifest are here."""


class Content(Protocol):
    """Files and blocks by content address, from the store or from whoever has them (`content/`)."""

    async def fetch(self, file: FileRef, *, progress: Progress | None = None) -> None:
        """Have the complete, verified file in the store.

        Raises ContentUnavailable, ModelError, DiskError. If cancelled: what has come is kept for the next fetch.
        """

    async def open(self, file: FileRef, *, progress: Progress | None = None) -> OpenFile:
        """Fetch it and open it where it can be read by path, whether it is encrypted or not. Close it."""

    async def block(self, cid: Cid) -> bytes:
        """One small block (a manifest); it is kept in the store. Raises ContentUnavailable, DiskError."""
