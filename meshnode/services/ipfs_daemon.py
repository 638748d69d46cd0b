"""What an operator's IPFS daemon does for the mesh beside giving single blocks.

The daemon learns where this node is and becomes its guest, so that blocks flow between them over Bitswap. If the
owner wants it (`content.ipfs_publish`), the daemon also keeps what this node holds of the model that the network
serves: added under the same CIDs, pinned, and unpinned when the network moves on. Only pins that were made here
are ever taken away.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import trio

from meshnode.core.errors import DiskError, ModelError, TransientError
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.ipfs.fallback import SourceFailed
from meshnode.services.port import ExternalPeers
from meshnode.state.port import Records
from meshnode.store.port import Content
from protocols.ids import Cid, PeerId, short

LOOK_SECONDS: Final = 5.0  # between looks at what is to be published
MEET_SECONDS: Final = 30.0  # between questions who the daemon is and where
RECHECK_SECONDS: Final = 600.0  # until the daemon is asked again whether it still keeps a file
FIRST_PAUSE_SECONDS: Final = 5.0  # after a failure of the daemon; doubles
LAST_PAUSE_SECONDS: Final = 60.0
FIRST_REST_SECONDS: Final = 60.0  # after a failure to publish, which may have cost the transfer of a file; doubles
LAST_REST_SECONDS: Final = 3600.0
MAX_INTRODUCTIONS: Final = 4  # of our addresses that the daemon is told
SETTING: Final = "content.ipfs_api"

_log = get_logger("daemon")


class Daemon(Protocol):
    """The RPC of the daemon. Every method raises SourceFailed when it can't be used, which its own health entry
    says, and another TransientError when it works and refuses."""

    @property
    def address(self) -> str: ...

    @property
    def local(self) -> bool:
        """Whether it runs on this machine."""

    async def identity(self) -> tuple[PeerId, tuple[str, ...]]:
        """Its peer id, and multiaddrs where it can be dialled."""

    async def connect(self, address: str) -> None:
        """Have it dial us."""

    async def check(self) -> bool:
        """Whether it can be used at all."""

    async def add(self, source: Path, *, pin: bool = True) -> Cid:
        """Give it a file; its CID, on which both agree."""

    async def put(self, block: bytes, cid: Cid) -> None: ...

    async def pinned(self, cid: Cid, *, recursive: bool = True) -> bool: ...

    async def pin(self, cid: Cid, *, recursive: bool = True) -> None: ...

    async def unpin(self, cid: Cid) -> None: ...


class Place(Protocol):
    """What is needed of the network host."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def addresses(self) -> tuple[str, ...]: ...

    @property
    def guests(self) -> tuple[PeerId, ...]: ...


@dataclass(frozen=True, slots=True)
class Release:
    """The model that the network serves."""

    name: str
    manifest: Cid
    files: tuple[Cid, ...]  # of all variants


class DaemonService:
    """Connects the daemon with this node, and keeps it supplied."""

    name = "ipfs-daemon"

    def __init__(
        self,
        daemon: Daemon,
        host: Place,
        external: ExternalPeers,
        content: Content,
        records: Records,
        health: Health,
        *,
        welcome: Callable[[PeerId], None],
        is_member: Callable[[PeerId], bool],
        release: Callable[[], Release | None],
        publish: bool,
    ) -> None:
        """
        Args:
          records: remembers which pins were made here.
          welcome: told who the daemon is, so that it takes part in the exchange of blocks.
          release: what the network serves; None while that is not known, which changes nothing.
          publish: whether the daemon keeps it; if not, what it kept before is unpinned.
        """
        self._daemon = daemon
        self._host = host
        self._external = external
        self._content = content
        self._records = records
        self._health = health
        self._welcome = welcome
        self._is_member = is_member
        self._release = release
        self._publish = publish
        self._peer: PeerId | None = None
        self._met_at = float("-inf")
        self._introduced = False
        self._kept: dict[Cid, float] = {}  # seen at the daemon since it came up, and when
        self._unfit: set[Cid] = set()  # files of ours that can't be given to it
        self._rests_until = float("-inf")
        self._rest = FIRST_REST_SECONDS

    @property
    def published(self) -> frozenset[Cid]:
        """What the daemon is known to keep of the model that the network serves."""
        return frozenset(self._kept)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look after the daemon until cancelled. If cancelled: what it has got stays there."""
        task_status.started()
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                peer = await self._meet()
                await self._supply(peer)
            except SourceFailed as error:
                _log.info("daemon.failed", address=self._daemon.address, reason=str(error), pause_s=pause)
                self._met_at = float("-inf")
                self._kept.clear()  # another daemon may come up in its place
                await trio.sleep(pause)
                pause = min(2 * pause, LAST_PAUSE_SECONDS)
            else:
                pause = FIRST_PAUSE_SECONDS
                await trio.sleep(LOOK_SECONDS)

    # Being connected

    async def _meet(self) -> PeerId:
        """Who the daemon is. It is made a guest, and told where we are."""
        if self._peer is None or trio.current_time() - self._met_at >= MEET_SECONDS:
            peer, addresses = await self._daemon.identity()
            if peer != self._peer:
                self._leave()
            if peer == self._host.peer_id or self._is_member(peer):
                # As a guest, a member would lose its place in the network.
                reason = f"it says that it is {peer}, which is a node of this network"
                self._health.set("ipfs-daemon", address=self._daemon.address, reason=reason)
                raise SourceFailed(reason)
            self._peer, self._met_at = peer, trio.current_time()
            self._external.configure(peer, addresses, SETTING)
            self._welcome(peer)
        if self._peer not in self._host.guests:
            self._introduced = False
        if not self._introduced:
            await self._introduce()
        return self._peer

    def _leave(self) -> None:
        self._kept.clear()
        self._introduced = False
        if self._peer is not None:
            self._external.release(self._peer, SETTING, "the daemon has another peer id now")
            self._peer = None

    async def _introduce(self) -> None:
        """Have the daemon dial us; a connection that it was asked for is one that it keeps."""
        ours = self._host.addresses
        near = [text for text in ours if text.startswith(("/ip4/127.", "/ip6/::1/")) is self._daemon.local]
        self._introduced = True
        for address in (near or list(ours))[:MAX_INTRODUCTIONS]:
            try:
                await self._daemon.connect(address)
            except SourceFailed:
                raise
            except TransientError as error:
                _log.debug("daemon.unconnected", address=address, reason=str(error))
            else:
                return

    # Publishing

    async def _supply(self, peer: PeerId) -> None:
        """Bring what the daemon keeps for us into line with what the network serves."""
        if trio.current_time() < self._rests_until:
            return
        release = self._release()
        if self._publish and release is None:
            return
        wanted = (release.manifest, *release.files) if self._publish and release is not None else ()
        model = release.name if release is not None else "the model"
        try:
            await self._drop_all_but(peer, wanted)
            if release is not None and wanted:
                await self._keep_all(peer, release)
        except (TransientError, DiskError) as error:
            if isinstance(error, SourceFailed) and not await self._daemon.check():
                raise
            self._rests_until = trio.current_time() + self._rest
            self._rest = min(2 * self._rest, LAST_REST_SECONDS)
            self._complain(model, str(error))
        else:
            self._rest = FIRST_REST_SECONDS
            if not self._unfit.intersection(wanted):
                self._health.clear("ipfs-publish")

    async def _drop_all_but(self, peer: PeerId, wanted: Iterable[Cid]) -> None:
        kept = frozenset(wanted)
        self._kept = {cid: seen for cid, seen in self._kept.items() if cid in kept}
        for name in sorted(self._records.records(_kind(peer)).keys() - kept):
            await self._daemon.unpin(Cid(name))
            self._records.remove_record(_kind(peer), name)
            _log.info("daemon.unpinned", cid=short(name))

    async def _keep_all(self, peer: PeerId, release: Release) -> None:
        held = self._content.files()
        if release.manifest in held and self._is_due(release.manifest):
            await self._keep(peer, release.manifest, self._give_manifest, recursive=False)
        for cid in release.files:
            if cid in held and cid not in self._unfit and self._is_due(cid):
                try:
                    await self._keep(peer, cid, self._give_file, recursive=True)
                except ModelError as error:
                    self._unfit.add(cid)
                    self._complain(release.name, str(error))

    def _is_due(self, cid: Cid) -> bool:
        return trio.current_time() - self._kept.get(cid, float("-inf")) >= RECHECK_SECONDS

    async def _keep(self, peer: PeerId, cid: Cid, give: Callable[[Cid], Awaitable[bool]], *, recursive: bool) -> None:
        if not await self._daemon.pinned(cid, recursive=recursive):
            self._records.put_record(_kind(peer), cid, b"")  # before the pin, which must not be left behind
            if not await give(cid):
                self._records.remove_record(_kind(peer), cid)
                return
            await self._daemon.pin(cid, recursive=recursive)
            _log.info("daemon.pinned", cid=short(cid))
        self._kept[cid] = trio.current_time()

    async def _give_manifest(self, cid: Cid) -> bool:
        block = self._content.block(cid)
        if block is not None:
            await self._daemon.put(block, cid)
        return block is not None

    async def _give_file(self, cid: Cid) -> bool:
        """Whether the file is at the daemon now; it may have left our store in the meantime."""
        file = await trio.to_thread.run_sync(self._content.reveal, cid)
        if file is None:
            return False
        with file as path:
            made = await self._daemon.add(path, pin=False)
        if made != cid:
            raise ModelError(
                f"the file {cid} is {made} by the rules of `ipfs add` for this mesh, so it was published by other "
                "means or has changed on the disk; `meshnode model verify` shows which"
            )
        return True

    def _complain(self, model: str, reason: str) -> None:
        self._health.set("ipfs-publish", address=self._daemon.address, model=model, reason=reason)
        _log.warning("daemon.unpublished", address=self._daemon.address, reason=reason)


def _kind(peer: PeerId) -> str:
    """Another daemon's pins are none of ours, whatever its address."""
    return f"ipfs.pin.{peer}"
