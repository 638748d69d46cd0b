"""What services see of each other. A service imports this file and no other service.

Whoever implements a protocol is a service of its own folder or file; `node.py` brings them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from meshnode.core.signal import Changes
from meshnode.engine import open_span
from meshnode.engine.port import Engine
from meshnode.model.release import ServedRelease
from meshnode.policy.duty import Duty
from meshnode.policy.guards import Guard
from meshnode.store.port import OpenFile
from protocols.advert.messages import Advert, Announcement, Holding, Span
from protocols.ids import Cid, PeerId
from protocols.manifest.messages import FileRef
from protocols.pipe.messages import Message
from protocols.rollout.messages import Candidate

M = TypeVar("M", bound=Message)
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


class Nearby(Protocol):
    """Members on the same local network (`local_discovery.py`)."""

    @property
    def changes(self) -> Changes:
        """Whenever `found` may say something else."""

    def found(self) -> Mapping[PeerId, Sequence[str]]:
        """Members that were heard there lately, and where they listen."""


class Directory(Adverts, Protocol):
    """The same, what we say about ourselves, and what is announced (`directory/`)."""

    def me(self) -> Advert:
        """Our own advert, with changes that are not published yet."""

    def advertise(self, advert: Advert) -> None:
        """Publish `dataclasses.replace(directory.me(), ...)`: within moments, a few times per second at most.

        Raises LocalProtocolError for a value that others would refuse; nothing is changed then.
        """

    def announcement(self) -> Announcement | None:
        """Which release the network is told to serve: the first of `ranked`."""

    def ranked(self) -> Sequence[Announcement]:
        """Words of publishers that are not taken back: those of founders' devices first, then the newest."""

    def announcements(self) -> Mapping[PeerId, Announcement]:
        """The newest announcement of every publisher, those taken back too, sorted by publisher."""

    def announce(
        self, *, name: str, version: str, manifest: Cid, variant: str, retired: bool = False
    ) -> Announcement:
        """Say that the network serves this release from now on, or no longer. Raises Declined `forbidden`."""


class Notices(Protocol):
    """What members tell everybody beside their adverts: one notice of each kind (`directory/notices.py`)."""

    @property
    def changes(self) -> Changes:
        """Whenever a notice says something else."""

    def all(self, kind: str) -> Mapping[PeerId, bytes]:
        """The newest notice of that kind of everybody who may give one, our own included, sorted by peer.

        The bytes are signed and of a member with the role; what they say is for the caller to check.
        """

    def give(self, kind: str, content: bytes) -> None:
        """Tell everybody, in place of our notice of that kind before; empty takes it back. It outlives a restart.

        Raises Declined `forbidden` without the role, LocalProtocolError for more than 16 KiB.
        """


class Releases(Protocol):
    """Which release the network serves (`releases.py`)."""

    @property
    def changes(self) -> Changes:
        """Whenever `current` changes."""

    @property
    def current(self) -> ServedRelease | None:
        """None until an announcement and its manifest are here."""

    @property
    def previous(self) -> ServedRelease | None:
        """What was served before `current`, and may still be while that is loaded."""

    @property
    def why_none(self) -> str:
        """While `current` is None: what is missing, in a sentence."""


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


class ReleasedAdapter(Protocol):
    """Which adapter the network answers with, where a question names none."""

    @property
    def changes(self) -> Changes:
        """Whenever `current` may say something else."""

    def current(self, base: Cid) -> Cid | None:
        """The adapter that is released for a release (the CID of its manifest); None: the bare model answers."""

    def kept(self, base: Cid) -> Sequence[Cid]:
        """Adapters for a release that questions may name now, the current one first: both sides of a roll-out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a candidate is worth beside what it is to replace. Losses in nats per token."""

    samples: int
    loss_new: float
    loss_old: float
    ci95: float  # half the 95 % confidence interval of the difference
    hardware: str = ""  # for people


class Judge(Protocol):
    """Compares adapters on the held-out samples of the network's lesson (`learning/`)."""

    @property
    def changes(self) -> Changes:
        """Whenever `suite` changes, or what could not be judged can be."""

    @property
    def suite(self) -> str:
        """CID of the held-out samples; empty: the network has no lesson."""

    async def compare(self, candidate: Candidate, seed: int) -> Comparison:
        """On the samples that `seed` draws. It waits until the device is idle.

        Raises MeshError when it can't be judged now. If cancelled: nothing happened.
        """


class Proposals(Protocol):
    """Where an adapter is proposed to be served (`rollout/`)."""

    def propose(self, adapter: Cid, base: Cid, frame: Cid, *, round: int, parents: tuple[str, ...]) -> object:
        """Raises Declined `not-ready` when it can't be done now, and others."""

    def proposed(self, frame: Cid) -> bool:
        """Whether an adapter of this lineage is proposed and was not refused."""


class Pipes(Protocol):
    """Messages of sessions to and from other nodes, and ourselves (`net/pipes.py`)."""

    def handle(self, kind: type[M], handler: Callable[[PeerId, M, bytes, int], None]) -> None:
        """Hand over messages of one kind as they come: (sender, message, body, microseconds under way).

        The handler must return at once. RemoteProtocolError from it ends the sender's pipe.
        """

    def on_lost(self, listener: Callable[[PeerId, str], None]) -> None:
        """Tell a listener (peer, reason) when what was sent to a peer last may not have arrived."""

    async def send(self, peer: PeerId, message: Message, body: bytes = b"") -> None:
        """Send one message. Raises PeerUnreachable, Declined. If cancelled: it is sent whole, or not at all."""


class OpenSpan(Protocol):
    """Layers that are open and compute."""

    @property
    def engine(self) -> Engine: ...

    @property
    def span(self) -> Span: ...

    @property
    def incarnation(self) -> int:
        """Of this node, as routes name it."""

    def enter(self) -> None:
        """A session begins on it."""

    def leave(self) -> None:
        """It has ended."""


class Spans(Protocol):
    """The layers that this node serves."""

    @property
    def serving(self) -> OpenSpan | None:
        """What new sessions may use now."""

    def engine_lost(self, engine: Engine, reason: str) -> None:
        """A step found the engine dead."""


@dataclass(frozen=True, slots=True)
class Loading:
    """A span on its way. `phase` is "fetching" or "opening"."""

    model: str  # for people
    span: Span
    phase: str
    files: int
    files_done: int
    bytes_total: int
    bytes_done: int


class ManySpans(Spans, Protocol):
    """Everything that is open here, for whoever decides what that is (`spans.py`)."""

    @property
    def serving(self) -> open_span.OpenSpan | None:
        """What new sessions may use now."""

    @property
    def changes(self) -> Changes:
        """Whenever a span begins or ceases to be served, is lost, or has ended."""

    @property
    def loading(self) -> Loading | None:
        """What is being fetched or opened."""

    @property
    def retiring(self) -> bool:
        """Whether an old span is still there, for its last sessions."""

    @property
    def rests_until(self) -> float:
        """After an engine was lost, nothing should be opened before (trio's clock)."""

    @property
    def layer_us(self) -> tuple[int, int]:
        """As measured on our engines: microseconds per average layer, one row, and per row of many; 0: not yet."""

    async def open(self, release: ServedRelease, span: Span) -> open_span.OpenSpan:
        """Fetch what the span needs, and start an engine for it. `serve` it or `discard` it.

        Raises ContentUnavailable, DiskError, ModelError, EngineLost, RemoteProtocolError.
        If cancelled: what was fetched may stay, an engine that is half open is ended.
        """

    def serve(self, opened: open_span.OpenSpan) -> None:
        """New sessions use this one from now on; the one before ends when its sessions have."""

    def vacate(self) -> None:
        """No new sessions; what was served ends when its sessions have."""

    def discard(self, opened: open_span.OpenSpan) -> None:
        """End one that was opened and is not served."""


class Holds(Protocol):
    """Other nodes' promises to keep layers (`holds.py`)."""

    async def keep(self, release: ServedRelease, guards: Sequence[Guard], epoch: int) -> str | None:
        """Have every guard promise to keep its layers while we leave them. None, or why one does not.

        epoch: of our intent. If cancelled: some may have promised; promises run out by themselves.
        """


class Opening(Protocol):
    """Layers that this node is about to serve (`spans.py`)."""

    @property
    def loading(self) -> object | None:
        """What is being fetched or opened."""


class Load(Protocol):
    """How busy our stage is (`inference/`)."""

    @property
    def changes(self) -> Changes:
        """Whenever one of the two has changed for longer than a moment."""

    @property
    def sessions(self) -> int:
        """That are open."""

    @property
    def queue_us(self) -> int:
        """How long a step waits for the engine, a moving average; small moves are not told."""


class Owner(Protocol):
    """What the owner has this node do (`owner.py`)."""

    @property
    def changes(self) -> Changes:
        """Whenever `duty` changes."""

    @property
    def duty(self) -> Duty:
        """All of it, no background work, or nothing."""

    @property
    def why(self) -> str:
        """Why not all of it, for people; empty when it is."""


class Attention(Protocol):
    """Whether questions are answered here (`inference/`)."""

    @property
    def counted(self) -> Changes:
        """Whenever `sessions` changes, at once."""

    @property
    def sessions(self) -> int:
        """That are open."""


class Members(Protocol):
    """Who belongs to our network (`membership.py`)."""

    @property
    def changes(self) -> Changes:
        """Whenever a connected member, or anybody's certificate, comes, changes or goes, but not when one expires."""

    def roles_of(self, peer: PeerId) -> frozenset[str]:
        """Roles of any peer whose certificate we have seen and that holds now; empty for everybody else."""


class Ranks(Members, Protocol):
    """The same, and whose word goes before that of others (`membership.py`)."""

    def is_founder(self, peer: PeerId) -> bool:
        """Whether the peer is a device for which a founder's key itself vouches."""


class Electors(Ranks, Protocol):
    """The same, and who is one party where votes are weighed (`membership.py`)."""

    def branch_of(self, peer: PeerId) -> PeerId:
        """The inviter that let a peer in and is no founder's device, or the peer itself."""


class Rights(Protocol):
    """Who may do what (`membership/rights.py`)."""

    def has(self, peer: PeerId, role: str) -> bool:
        """Whether a peer has a role, at this moment."""

    def demand(self, us: PeerId, role: str, deed: str) -> None:
        """For what this node wants to do itself ("ask questions"). Raises Declined `forbidden`, with what to do."""

    def may(self, peer: PeerId, role: str, deed: str) -> bool:
        """The same for something that the peer does; a member that may not is named to people with its deed."""


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
