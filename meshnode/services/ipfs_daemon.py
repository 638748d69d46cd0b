"""What an operator's IPFS daemon does for the mesh besides giving single blocks.

The daemon learns where this node is and is kept connected, so that blocks flow between them over Bitswap. If the
owner wants it (`content.ipfs_publish`), the daemon also keeps what this node holds of the model that the network
serves: added under the same CIDs, pinned, and unpinned when the network moves on. Only pins that were made here are
ever taken away.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Final, Protocol

import trio

from meshnode.core.errors import DiskError, ModelError, TransientError
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.ipfs.source_order import SourceFailed
from meshnode.model.release import ServedRelease
from meshnode.net.port import Host, PeerEvent
from meshnode.services.port import ExternalPeers, Inventory, Members, Owner, Releases
from meshnode.state.port import Records
from meshnode.store.port import Content
from protocols.backoff import Backoff
from protocols.ids import Cid, PeerId, short
from protocols.multiaddr import is_loopback

MEET_S: Final = 30.0  # between questions who the daemon is and where
RECHECK_S: Final = 600.0  # until the daemon is asked again whether it still keeps a file
FIRST_PAUSE_S: Final = 5.0  # after a failure of the daemon
LAST_PAUSE_S: Final = 60.0
FIRST_REST_S: Final = 60.0  # after a failure to publish, which may have cost the transfer of a file
LAST_REST_S: Final = 3600.0
MAX_INTRODUCTIONS: Final = 4  # of our addresses that the daemon is told
SETTING: Final = "content.ipfs_api"

_log = get_logger("ipfs-daemon")


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


class Publication:
    """What the daemon keeps of the model that the network serves."""

    def __init__(
        self,
        daemon: Daemon,
        store: Content,
        records: Records,
        health: Health,
        *,
        held: Inventory,
        releases: Releases | None,
        owner: Owner | None = None,
    ) -> None:
        """
        Args:
          records: remembers which pins were made here.
          held: says when the store holds more or less of the served model.
          releases: what the network serves; nothing changes while it serves nothing yet. None: the daemon keeps
            nothing for us, and what it kept before is unpinned.
          owner: nothing changes while it wants no background work. None: it always does.
        """
        self._daemon = daemon
        self._store = store
        self._records = records
        self._health = health
        self._releases = releases
        self._owner = owner
        causes = (held, releases, owner)
        self.causes = tuple(cause.changes for cause in causes if cause is not None)
        self._kept: dict[Cid, float] = {}  # seen at the daemon since it came up, and when
        self._unfit: set[Cid] = set()  # files of ours that can't be given to it
        self._backoff = Backoff(FIRST_REST_S, LAST_REST_S)
        self._rests_until = float("-inf")

    @property
    def kept(self) -> frozenset[Cid]:
        """What the daemon is known to keep of the model that the network serves."""
        return frozenset(self._kept)

    def forget(self) -> None:
        """Another daemon may come up in the place of this one: nothing is known to be kept."""
        self._kept.clear()

    async def update(self, peer: PeerId) -> None:
        """Bring what the daemon of this peer id keeps into line with what the network serves.

        Raises SourceFailed when the daemon can't be used. What it refuses stands in the health of the node, and is
        tried again ever more rarely. If cancelled: what the daemon has got stays there.
        """
        if trio.current_time() < self._rests_until or (self._owner and not self._owner.duty.background):
            return
        release = None
        if self._releases is not None and (release := self._releases.current) is None:
            return
        wanted = () if release is None else (release.cid, *release.manifest.all_files())
        try:
            await self._drop_all_but(peer, wanted)
            if release is not None:
                await self._keep_all(peer, release)
        except (TransientError, DiskError) as error:
            if isinstance(error, SourceFailed) and not await self._daemon.check():
                raise
            self._rests_until = trio.current_time() + self._backoff.next()
            self._complain(release, str(error))
        else:
            self._backoff.reset()
            if not self._unfit.intersection(wanted):
                self._health.clear("ipfs-publish")

    async def _drop_all_but(self, peer: PeerId, wanted: Iterable[Cid]) -> None:
        kept = frozenset(wanted)
        self._kept = {cid: seen for cid, seen in self._kept.items() if cid in kept}
        for name in sorted(self._records.records(_kind(peer)).keys() - kept):
            await self._daemon.unpin(Cid(name))
            self._records.remove_record(_kind(peer), name)
            _log.info("daemon.unpinned", cid=short(name))

    async def _keep_all(self, peer: PeerId, release: ServedRelease) -> None:
        held = self._store.files()
        if release.cid in held and self._is_due(release.cid):
            await self._keep(peer, release.cid, self._give_manifest, recursive=False)
        for cid in release.manifest.all_files():
            if cid in held and cid not in self._unfit and self._is_due(cid):
                try:
                    await self._keep(peer, cid, self._give_file, recursive=True)
                except ModelError as error:
                    self._unfit.add(cid)
                    self._complain(release, str(error))

    def _is_due(self, cid: Cid) -> bool:
        return trio.current_time() - self._kept.get(cid, float("-inf")) >= RECHECK_S

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
        block = self._store.block(cid)
        if block is not None:
            await self._daemon.put(block, cid)
        return block is not None

    async def _give_file(self, cid: Cid) -> bool:
        """Whether the file is at the daemon now; it may have left our store in the meantime."""
        file = await trio.to_thread.run_sync(self._store.reveal, cid)
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

    def _complain(self, release: ServedRelease | None, reason: str) -> None:
        model = "the model" if release is None else release.title
        self._health.set("ipfs-publish", address=self._daemon.address, model=model, reason=reason)
        _log.warning("daemon.unpublished", address=self._daemon.address, reason=reason)


class IpfsDaemonService:
    """Connects the daemon with this node, and keeps it supplied."""

    name = "ipfs-daemon"

    def __init__(
        self,
        daemon: Daemon,
        host: Host,
        external: ExternalPeers,
        members: Members,
        publication: Publication,
        health: Health,
    ) -> None:
        """`external`: where the daemon is kept connected, and so asked for blocks."""
        self._daemon = daemon
        self._host = host
        self._external = external
        self._members = members
        self._publication = publication
        self._health = health
        self._peer: PeerId | None = None
        self._met_at = float("-inf")
        self._introduced = False
        self._causes = Changes()  # to look after the daemon: all of them

    @property
    def published(self) -> frozenset[Cid]:
        """What the daemon is known to keep of the model that the network serves."""
        return self._publication.kept

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look after the daemon until cancelled. If cancelled: what it has got stays there."""
        async with trio.open_nursery() as nursery:
            for changes in self._publication.causes:
                nursery.start_soon(self._relay, changes)
            nursery.start_soon(self._follow, self._host.guest_events())
            task_status.started()
            await self._look_after()

    async def _relay(self, changes: Changes) -> None:
        version = changes.version
        while True:
            version = await changes.wait(version)
            self._causes.notify()

    async def _follow(self, events: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        async for event in events:
            if event.peer == self._peer and not event.connected:
                self._introduced = False
                self._causes.notify()

    async def _look_after(self) -> None:
        backoff = Backoff(FIRST_PAUSE_S, LAST_PAUSE_S)
        while True:
            version = self._causes.version
            try:
                peer = await self._meet()
                await self._publication.update(peer)
            except SourceFailed as error:
                pause = backoff.next()
                _log.info("daemon.failed", address=self._daemon.address, reason=str(error), pause_s=pause)
                self._met_at = float("-inf")
                self._publication.forget()
                await trio.sleep(pause)
            else:
                backoff.reset()
                with trio.move_on_after(MEET_S):
                    await self._causes.wait(version)

    async def _meet(self) -> PeerId:
        """Who the daemon is. It is kept connected, and told where we are. Raises SourceFailed."""
        if self._peer is None or trio.current_time() - self._met_at >= MEET_S:
            peer, addresses = await self._daemon.identity()
            if peer != self._peer:
                self._leave()
            if peer == self._host.peer_id or self._members.roles_of(peer):
                # As a guest, a member would lose its place in the network.
                reason = f"it says that it is {peer}, which is a node of this network"
                self._health.set("ipfs-daemon", address=self._daemon.address, reason=reason)
                raise SourceFailed(reason)
            self._peer, self._met_at = peer, trio.current_time()
            self._external.configure(peer, addresses, SETTING)
        if not self._introduced or self._peer not in self._host.guests:
            await self._introduce()
        return self._peer

    def _leave(self) -> None:
        self._publication.forget()
        self._introduced = False
        if self._peer is not None:
            self._external.release(self._peer, SETTING, "the daemon has another peer id now")
            self._peer = None

    async def _introduce(self) -> None:
        """Have the daemon dial us; a connection that it was asked for is one that it keeps."""
        ours = self._host.addresses
        near = [text for text in ours if is_loopback(text) is self._daemon.local]
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


def _kind(peer: PeerId) -> str:
    """Another daemon's pins are none of ours, whatever its address."""
    return f"ipfs.pin.{peer}"
