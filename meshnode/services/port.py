"""What services see of each other. A service imports this file and no other service.

Whoever implements a protocol is a service of its own folder or file; `node.py` brings them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from meshnode.core.signal import Changes
from meshnode.model.release import ServedRelease
from meshnode.store.port import OpenFile
from protocols.advert.messages import Advert, Announcement, Holding
from protocols.ids import Cid, PeerId
from protocols.manifest.messages import FileRef

Progress = Callable[[int, int], None]  # (bytes verified and written, bytes in all)


class Adverts(Protocol):
    """What every node says about itself (`directory/`)."""

    @property
    def changes(self) -> Changes:
        """Whenever a live advert says something else, somebody appears or vanishes, or an announcement changes."""

    def live(self) -> Mapping[PeerId, Advert]:
        """The newest advert of every node that is there, our own included."""

    def providers(self, cid: Cid) -> Sequence[PeerId]:
        """Peers that say they have a file or block, never ourselves; the best first."""


class Directory(Adverts, Protocol):
    """The same, what we say about ourselves, and what is announced (`directory/`)."""

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


class Opening(Protocol):
    """Layers that this node is about to serve (`spans.py`)."""

    @property
    def loading(self) -> object | None:
        """What is being fetched or opened."""


class Load(Protocol):
    """How busy our stage is (`inference/`)."""

    @property
    def changes(self) -> Changes:
        """Whenever one of the two changes."""

    @property
    def sessions(self) -> int:
        """That are open."""

    @property
    def queue_us(self) -> int:
        """How long a step waits for the engine, a moving average; small moves are not told."""


class Members(Protocol):
    """Who belongs to our network (`membership.py`)."""

    @property
    def changes(self) -> Changes:
        """Whenever a connected member, or anybody's certificate, comes, changes or goes, but not when one expires."""

    def roles_of(self, peer: PeerId) -> frozenset[str]:
        """Roles of any peer whose certificate we have seen and that holds now; empty for everybody else."""


class Strangers(Protocol):
    """What becomes of connected peers that are of no network of ours (`external_peers.py`)."""

    def take_in(self, peer: PeerId) -> bool:
        """Let a connected peer stay that does not speak our hello at all. Whether it may."""


class Guests(Protocol):
    """Peers outside the network that our owner has named (`external_peers.py`)."""

    @property
    def configured(self) -> tuple[PeerId, ...]:
        """Those that a setting names, connected or not."""


class ExternalPeers(Guests, Protocol):
    """Peers outside the network and why each is kept connected (`external_peers.py`)."""

    def configure(self, peer: PeerId, addresses: Sequence[str], setting: str) -> None:
        """Keep a peer connected because `setting` names it, or learn where it is found now."""

    def release(self, peer: PeerId, setting: str, reason: str) -> None:
        """`setting` does not name it any more; its connections are closed unless there is another reason."""

    def use(
        self, peer: PeerId, addresses: Sequence[str], protocols: Sequence[str] = ()
    ) -> AbstractAsyncContextManager[None]:
        """Be connected to a peer, which is no member and may use these protocols meanwhile.

        Raises PeerUnreachable. If cancelled: the peer is let go.
        """


class Inventory(Protocol):
    """What this node has on disk (`inventory.py`)."""

    @property
    def changes(self) -> Changes:
        """Whenever `holdings` changes."""

    def holdings(self) -> tuple[Holding, ...]:
        """What we hold of every release that is announced, and whose manifest is here; a second old at most."""

    def look(self) -> None:
        """Count what was stored a moment ago, too."""


class RecordSigner(Protocol):
    """The node key."""

    def sign(self, domain: str, payload: bytes) -> bytes:
        """A signed record (protocols/envelope)."""
