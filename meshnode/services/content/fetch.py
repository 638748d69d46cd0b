"""Content: fetch files and blocks by address from several peers at once, and serve them to others.

The machines of `protocols/bitswap` decide; this service moves the bytes. Between two peers there is one stream
per direction on the bulk lane: ours carries our wishes and our answers, theirs carries theirs. Hashing and
writing run in worker threads, in batches, while the event loop reads on; every queue is bounded, so a slow
disk slows the peers down and costs no memory.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, Unpack

import trio

from meshnode.core.errors import ContentUnavailable, Declined, DiskError, PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.core.workers import Args, Result, Threads, Workers
from meshnode.net.port import Host, Lane, PeerEvent, Stream
from meshnode.services.content.outbox import Outbox
from meshnode.services.content.sources import FromOutside, Search, Session, SoFar, TreeFromOutside
from meshnode.services.port import Progress
from meshnode.store.port import OpenFile, Partial, Store
from protocols.bitswap import client as asking
from protocols.bitswap.messages import (
    PROTOCOL,
    Block,
    Buffer,
    Message,
    MessageReader,
    Presence,
    PresenceType,
    decode,
    modern,
    prefix_of,
    spellings,
)
from protocols.bitswap.server import Answer, Server
from protocols.errors import LocalProtocolError, MeshError, RemoteProtocolError
from protocols.ids import Cid, PeerId, cid_codec, cid_to_bytes, short
from protocols.manifest.messages import FileRef

PATIENCE_SECONDS: Final = 30.0  # without one verified block, until a fetch gives up
OFFER_SECONDS: Final = 0.5  # how often a fetch looks for new providers
OUTSIDE_SECONDS: Final = 3.0  # without a block from a peer, until sources outside the mesh are asked
ACQUAINTED_SECONDS: Final = 10.0  # after the start, who has what is known; before, nobody known means nothing
GUEST_SECONDS: Final = 1.5  # a fetch that got no block from members for so long asks guests
SEEK_SECONDS: Final = 2.5  # a fetch that got no block from anybody for so long has further peers looked for
MAX_REMEMBERED: Final = 4096  # peers; whoever comes for our blocks is forgotten when it leaves
OTHERS: Final = PeerId("others")  # in the counts of bytes: those who were forgotten
OPEN_SECONDS: Final = 15.0  # a stream to a connected peer; its own connection for bulk may have to be made
FIRST_PAUSE_SECONDS: Final = 0.2  # between attempts to open a stream; doubles
LAST_PAUSE_SECONDS: Final = 10.0
IDLE_SECONDS: Final = 60.0  # an outgoing stream nobody needs is closed after this
RECEIVE_BYTES: Final = 1 << 18
UNVERIFIED_MESSAGES: Final = 2  # received, waiting for a hashing thread
VERIFIERS: Final = 2  # one hashes while the other hands over
INBOX_BLOCKS: Final = 8  # verified blocks that wait for the disk, per fetch
BATCH_BLOCKS: Final = 8  # blocks written by one visit to a thread and one transaction
ANSWERS: Final = 24  # loaded and not yet written, all peers together: 24 MiB
INLINE_BYTES: Final = 1 << 15  # so little is hashed at once, without a thread
BLOCK_HINT_BYTES: Final = 1 << 16  # a single block of unknown size counts as this in a peer's window
BUSY_SECONDS: Final = 0.3  # between looks at a file that another process is fetching

Offer = Callable[[PeerId], Awaitable[None]]
Seek = Callable[[Cid, Offer], Awaitable[None]]  # offers peers that may have a root and are connected, until cancelled


class _Fetch:
    """One file on its way in, for everybody who waits for it."""

    def __init__(self, cid: Cid, size: int) -> None:
        self.cid = cid
        self.size = size
        self.waiters = 0
        self.watchers: list[Progress] = []
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.path: Path | None = None
        self.error: MeshError | None = None


class ContentService:
    """Fetches and serves content-addressed bytes. Build it before `host.run`, run it in a nursery."""

    name = "content"

    def __init__(
        self,
        host: Host,
        store: Store,
        providers: Callable[[Cid], Sequence[PeerId]],
        *,
        patience: float = PATIENCE_SECONDS,
        guests: Sequence[PeerId] = (),
        share_with_guests: bool = False,
        outside: FromOutside | None = None,
        tree_outside: TreeFromOutside | None = None,
        outside_so_far: SoFar | None = None,
        seek: Seek | None = None,
        sought: SoFar | None = None,
        advice: SoFar | None = None,
        share_with_anyone: bool = False,
        is_member: Callable[[PeerId], bool] = lambda peer: True,
        workers: Workers = Threads(),
    ) -> None:
        """
        Args:
          providers: who is believed to hold this root, best first; asked again while a fetch runs.
          guests: IPFS nodes outside the network; asked whether they have a block when members do not give it.
          share_with_guests: whether guests get our blocks; else it looks to them as if we held none.
          patience: seconds without a verified block until a fetch gives up.
          outside: gives single blocks from outside the mesh; asked for what no peer gives.
          tree_outside: hands over all blocks of a file from there, parents first; asked before single blocks.
          outside_so_far: what the sources have said to a question that is under way, for the error.
          seek: looks for peers outside the network for what nobody gives; they are guests meanwhile.
          sought: how that went, for the error.
          advice: what else its reader can do about a block that nobody gives, a clause after "ask again".
          share_with_anyone: whether everybody who connects gets our blocks, strangers among them.
          is_member: whether a peer comes before strangers.
          workers: where disks and hashes are waited for.
        """
        self._host = host
        self._store = store
        self._providers = providers
        self._patience = patience
        self._client = asking.Client()
        self._guests = set(guests)
        self._share_with_guests = share_with_guests
        self._share_with_anyone = share_with_anyone
        self._server = Server(
            lambda cid: store.block_size(modern(cid)),
            self._may_have,
            lambda peer: peer not in host.guests and is_member(peer),
        )
        self._seek = seek
        self._sought = sought
        self._advice = advice
        self._seeking: dict[int, trio.CancelScope] = {}  # by session
        self._found: dict[PeerId, None] = {}  # peers that `seek` has offered, oldest first
        self._asked: dict[PeerId, None] = {}  # peers that were asked for something, oldest first
        self._outboxes: dict[PeerId, Outbox] = {}
        self._fetches: dict[Cid, _Fetch] = {}
        self._inboxes: dict[int, trio.MemorySendChannel[tuple[bytes, Buffer]]] = {}
        self._numbers = itertools.count(1)
        self._workers = workers
        self._threads = trio.CapacityLimiter(6)
        self._answers = trio.CapacityLimiter(ANSWERS)
        self._began = 0.0
        self._last_block = float("-inf")  # when the last verified block came, for any fetch
        self._fed: dict[int, float] = {}  # session -> when a peer gave its last verified block, or when it began
        self._outside = outside
        self._tree_outside = tree_outside
        self._outside_so_far = outside_so_far
        self._searches: dict[int, Search] = {}  # by session
        self._sleeping_until: float | None = None
        self._poke = trio.Event()
        self._turn = trio.Event()
        self._running = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._to_verify, self._unverified = trio.open_memory_channel[tuple[PeerId, Message]](UNVERIFIED_MESSAGES)
        self._log = get_logger("content")
        self.fetched_from: Counter[PeerId] = Counter()  # bytes of blocks that came, also wrong or double ones
        self.served_to: Counter[PeerId] = Counter()  # bytes of blocks that were written to the stream
        host.handle(PROTOCOL, self._receive, open_to_strangers=share_with_anyone)

    @property
    def bytes_fetched(self) -> int:
        """Bytes of blocks received from anybody since the start."""
        return self.fetched_from.total()

    @property
    def bytes_served(self) -> int:
        """Bytes of blocks sent to anybody since the start."""
        return self.served_to.total()

    def bad_providers(self) -> dict[PeerId, str]:
        """Peers that are not asked any more since they lied or broke the protocol, with what they did."""
        return dict(self._client.banned)

    def welcome(self, guest: PeerId) -> None:
        """One more guest; nothing happens for one that is known."""
        self._guests.add(guest)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve and fetch until cancelled. If cancelled: running fetches stop and can be taken up again."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._tick)
            nursery.start_soon(self._answer)
            nursery.start_soon(self._follow, self._host.events())
            nursery.start_soon(self._follow, self._host.guest_events())
            for _ in range(VERIFIERS):
                nursery.start_soon(self._verify)
            self._began = trio.current_time()
            self._running.set()
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None
                self._outboxes.clear()

    async def fetch(self, file: FileRef, *, progress: Progress | None = None) -> None:
        """Have the complete, verified file in the store, from there or from peers.

        Two calls for one CID share the transfer. `progress` is called with bytes done and in all.
        Raises ContentUnavailable (nobody gave a block for a while), ModelError (no file of this size has this
        CID), DiskError. If cancelled: what has come is kept for the next fetch, unless somebody else waits for
        it, in which case it goes on.
        """
        if await self._in_thread(self._store.path, file.cid) is not None:
            if progress is not None:
                progress(file.size, file.size)
            return
        await self._running.wait()
        fetch = self._fetches.get(file.cid)
        if fetch is None or fetch.size != file.size:
            fetch = self._fetches[file.cid] = _Fetch(file.cid, file.size)
            self._spawn(self._run_fetch, fetch)
        fetch.waiters += 1
        if progress is not None:
            fetch.watchers.append(progress)
        try:
            await fetch.done.wait()
        finally:
            fetch.waiters -= 1
            if progress is not None:
                fetch.watchers.remove(progress)
            if not fetch.waiters and not fetch.done.is_set():
                self._forget(fetch)
                fetch.scope.cancel()
        if fetch.path is None:
            raise fetch.error or ContentUnavailable(
                f"the transfer of {file.cid} was stopped; ask for it again", cid=file.cid
            )

    async def open(self, file: FileRef, *, progress: Progress | None = None) -> OpenFile:
        """Fetch it and open it where it can be read by path, whether it is encrypted or not. Close it.

        Raises what `fetch` raises. If cancelled: as there.
        """
        await self.fetch(file, progress=progress)
        opened = await self._in_thread(self._store.reveal, file.cid)
        if opened is None:
            raise ContentUnavailable(
                f"the file {file.cid} was removed while it was being opened; ask again", cid=file.cid
            )
        return opened

    async def block(self, cid: Cid) -> bytes:
        """One block (a manifest), from the store or from peers; it is kept in the store.

        Raises ContentUnavailable, DiskError. If cancelled: nothing was kept.
        """
        held = await self._in_thread(self._store.block, cid)
        if held is not None:
            return held
        await self._running.wait()
        session, inbox = self._open_session(cid)
        try:
            await self._handle(asking.Want(session, {cid_to_bytes(cid): BLOCK_HINT_BYTES}))
            with trio.move_on_after(self._patience) as limit:
                _, data = await inbox.receive()
            if limit.cancelled_caught:
                raise self._unavailable(session, cid)
        finally:
            self._close_session(session)
        block = bytes(data)
        await self._in_thread(self._store.put_block, block, cid_codec(cid))
        return block

    # One fetch

    async def _run_fetch(self, fetch: _Fetch) -> None:
        try:
            with fetch.scope:
                fetch.path = await self._transfer(fetch)
        except MeshError as error:
            fetch.error = error
        finally:
            self._forget(fetch)
            fetch.done.set()

    def _forget(self, fetch: _Fetch) -> None:
        if self._fetches.get(fetch.cid) is fetch:
            del self._fetches[fetch.cid]

    async def _transfer(self, fetch: _Fetch) -> Path:
        partial = await self._open_partial(fetch)
        if isinstance(partial, Path):
            return partial
        session, inbox = self._open_session(fetch.cid, fetch.size, partial.done_bytes)
        try:
            await self._handle(asking.Want(session, partial.wanted()))
            while not partial.complete:
                with trio.move_on_after(self._patience) as limit:
                    batch = [await inbox.receive()]
                if limit.cancelled_caught:
                    if self._hopeful(session):
                        continue
                    raise self._unavailable(session, fetch.cid)
                while len(batch) < BATCH_BLOCKS:
                    try:
                        batch.append(inbox.receive_nowait())
                    except trio.WouldBlock:
                        break
                wanted = await self._in_thread(partial.write, batch)
                if self._server.added([name for cid, _ in batch for name in spellings(cid)]):
                    self._turn.set()
                await self._handle(asking.Want(session, wanted))
                if session in self._searches:
                    self._searches[session].settle(len(batch), partial.done_bytes)
                for watcher in fetch.watchers:
                    watcher(partial.done_bytes, fetch.size)
            path = await self._in_thread(partial.finish)
        finally:
            self._close_session(session)
            partial.close()
        self._log.debug("file.fetched", cid=short(fetch.cid), size_bytes=fetch.size)
        return path

    async def _open_partial(self, fetch: _Fetch) -> Partial | Path:
        """Wait while another process fetches the same file into the same folder."""
        while True:
            try:
                return await self._in_thread(self._store.open_partial, fetch.cid, fetch.size)
            except Declined:
                await trio.sleep(BUSY_SECONDS)

    def _open_session(
        self, cid: Cid, size: int = 0, done: int = 0
    ) -> tuple[int, trio.MemoryReceiveChannel[tuple[bytes, Buffer]]]:
        session = next(self._numbers)
        self._inboxes[session], inbox = trio.open_memory_channel[tuple[bytes, Buffer]](INBOX_BLOCKS)
        self._fed[session] = trio.current_time()
        self._spawn(self._offer, session, cid)
        if self._seek is not None:
            scope = self._seeking[session] = trio.CancelScope()
            self._spawn(self._have_sought, session, cid, scope, self._seek)
        if self._outside is not None:
            search = self._search(session, cid, size, done, self._outside)
            self._searches[session] = search
            self._spawn(search.run)
        return session, inbox

    def _close_session(self, session: int) -> None:
        self._inboxes.pop(session).close()
        del self._fed[session]
        if session in self._searches:
            self._searches.pop(session).scope.cancel()
        if session in self._seeking:
            self._seeking.pop(session).cancel()
        for outbox in self._outboxes.values():
            outbox.sessions.discard(session)
        self._perform_sends(self._client.handle(asking.Close(session), trio.current_time()))

    async def _offer(self, session: int, cid: Cid) -> None:
        """Tell the machine who may have it, again and again, until the session is closed."""
        while session in self._inboxes:
            peers = [
                peer
                for peer in self._providers(cid)
                if peer != self._host.peer_id and peer not in self._client.banned
            ]
            for peer in peers:
                self._include(session, peer)
            await self._handle(asking.Offer(session, tuple(peers)))
            if session in self._fed and (not peers or trio.current_time() - self._fed[session] >= GUEST_SECONDS):
                await self._offer_guests(session)
            await trio.sleep(OFFER_SECONDS)

    async def _offer_guests(self, session: int) -> None:
        """The last resort: nobody knows what they hold, so they are asked before they are relied on."""
        guests = tuple(sorted(self._guests - self._client.banned.keys()))
        for guest in guests:
            self._include(session, guest)
        if guests:
            await self._handle(asking.Offer(session, guests, certain=False))

    def _include(self, session: int, peer: PeerId) -> None:
        _remember(self._asked, peer)
        self._outbox(peer).sessions.add(session)

    async def _have_sought(self, session: int, cid: Cid, scope: trio.CancelScope, seek: Seek) -> None:
        """Once nobody has given a block for a while: ask those whom `seek` offers, until the session is closed."""

        async def offer(peer: PeerId) -> None:
            if session not in self._inboxes or peer in self._client.banned:
                return
            _remember(self._found, peer)
            self._include(session, peer)
            await self._handle(asking.Offer(session, (peer,), certain=False))

        with scope:
            quiet = 0.0
            while quiet < SEEK_SECONDS and self._found.keys().isdisjoint(self._host.guests):
                await trio.sleep(SEEK_SECONDS - quiet)
                quiet = trio.current_time() - self._fed[session]
            await seek(cid, offer)

    def _search(self, session: int, cid: Cid, size: int, done: int, outside: FromOutside) -> Search:
        began = trio.current_time()

        async def found(name: bytes, block: bytes) -> None:
            await self._handle(asking.Found(name, block))

        view = Session(
            root=cid,
            size=size,
            fed=lambda: self._fed.get(session, began),
            patience=lambda: self._outside_after(cid),
            unasked=lambda count: self._client.unasked(session, count),
            found=found,
        )
        return Search(view, outside, self._tree_outside, so_far=self._outside_so_far, done=done)

    def _outside_after(self, cid: Cid) -> float:
        """Seconds without a block until sources outside the mesh are asked; none where nobody else could have it."""
        if trio.current_time() - self._began < ACQUAINTED_SECONDS or not self._guests.isdisjoint(self._host.guests):
            return OUTSIDE_SECONDS
        known = set(self._providers(cid)) - self._client.banned.keys() - {self._host.peer_id}
        return OUTSIDE_SECONDS if known else 0.0

    def _hopeful(self, session: int) -> bool:
        """Whether a provider owes us something and is busy with blocks for other fetches."""
        recent = trio.current_time() - self._last_block < self._patience
        return recent and any(self._client.owed(peer) for peer in self._client.asked(session))

    def _unavailable(self, session: int, cid: Cid) -> ContentUnavailable:
        words = []
        for peer, word in self._client.asked(session).items():
            outbox = self._outboxes.get(peer)
            trouble = outbox.trouble if outbox is not None else ""
            words.append(f"{short(peer)} {word}" + (f" ({trouble})" if trouble and word == "not reachable" else ""))
        asked = "; asked were: " + ", ".join(words) if words else "; no peer is known to hold it"
        search = self._searches.get(session)
        if search is not None and search.trouble:
            asked += f"; {search.trouble}"
        if session in self._seeking and self._sought is not None and (how := self._sought(cid)):
            asked += f"; {how}"
        advice = "" if self._advice is None else self._advice(cid)
        return ContentUnavailable(
            f"nobody gave {cid} for {self._patience:.0f} s{asked}. Start a node that holds it (`meshnode status` "
            f"shows who holds what) and ask again{advice}; what has come so far is kept",
            cid=cid,
        )

    # Machines and effects

    async def _handle(self, event: asking.Event) -> None:
        effects = self._client.handle(event, trio.current_time())
        self._perform_sends(effects)
        for effect in effects:
            if isinstance(effect, asking.Got):
                self._last_block = trio.current_time()
                for session in effect.sessions:
                    if session in self._fed and effect.peer is not None:
                        self._fed[session] = self._last_block
                    await self._deliver(session, effect.cid, effect.data)

    async def _deliver(self, session: int, cid: bytes, data: Buffer) -> None:
        inbox = self._inboxes.get(session)
        if inbox is None:
            return
        if session in self._searches:
            self._searches[session].deliver()
        try:
            await inbox.send((cid, data))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # the fetch ended while we waited

    def _perform_sends(self, effects: Sequence[asking.Effect]) -> None:
        for effect in effects:
            match effect:
                case asking.Send(peer, message):
                    self._outbox(peer).ask(message)
                case asking.Banned(peer, reason):
                    self._log.warning("provider.banned", peer=short(peer), reason=reason)
                    if peer in self._outboxes:
                        self._outboxes[peer].sessions.clear()
                case asking.Stalled(peer, given_up):
                    self._log.info("provider.stalled", peer=short(peer), given_up=given_up)
                    if given_up and peer in self._outboxes:
                        self._outboxes[peer].trouble = "it stopped answering"
                        self._outboxes[peer].drop()
                case asking.Got():
                    pass
        deadline = self._client.deadline
        if deadline is not None and (self._sleeping_until is None or deadline < self._sleeping_until):
            self._poke.set()

    async def _tick(self) -> None:
        """Wake the asking machine at its deadlines."""
        while True:
            self._sleeping_until = self._client.deadline
            self._poke = trio.Event()
            with trio.move_on_at(float("inf") if self._sleeping_until is None else self._sleeping_until) as limit:
                await self._poke.wait()
            if limit.cancelled_caught:
                await self._handle(asking.Tick())

    async def _follow(self, events: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        """Connections that come and go."""
        async for event in events:
            outbox = self._outboxes.get(event.peer)
            if event.connected:
                if outbox is not None:
                    outbox.wake()
                continue
            if event.peer in self._host.guests:
                continue  # it was a stranger and is a guest from now on; the connection is the same
            self._server.gone(event.peer)
            if outbox is not None:
                outbox.trouble = event.reason
                outbox.clear()
                outbox.drop()
            if event.peer in self._asked:
                await self._handle(asking.PeerDown(event.peer))
            else:
                await self._handle(asking.Forget(event.peer))
                for counter in (self.served_to, self.fetched_from):
                    counter[OTHERS] += counter.pop(event.peer, 0)

    # Streams out

    def _outbox(self, peer: PeerId) -> Outbox:
        outbox = self._outboxes.get(peer)
        if outbox is None:
            outbox = self._outboxes[peer] = Outbox(peer)
            self._spawn(self._keep, outbox)
        return outbox

    async def _keep(self, outbox: Outbox) -> None:
        """Keep a stream to a peer open while it is needed."""
        peer, pause = outbox.peer, FIRST_PAUSE_SECONDS
        await trio.lowlevel.checkpoint()
        while outbox.needed:
            try:
                with trio.fail_after(OPEN_SECONDS):
                    stream = await self._host.open_stream(peer, PROTOCOL, Lane.BULK)
            except (PeerUnreachable, Declined, trio.TooSlowError) as error:
                outbox.trouble = str(error) or f"no stream within {OPEN_SECONDS:.0f} s"
                self._server.gone(peer)
                outbox.clear()
                with trio.move_on_after(pause):
                    await outbox.wait()
                pause = min(2 * pause, LAST_PAUSE_SECONDS)
                continue
            pause, outbox.trouble = FIRST_PAUSE_SECONDS, ""
            try:
                await self._handle(asking.PeerUp(peer))
                await outbox.pump(stream, idle_seconds=IDLE_SECONDS)
            except PeerUnreachable as error:
                outbox.trouble = str(error)
            finally:
                self._perform_sends(self._client.handle(asking.PeerDown(peer), trio.current_time()))
                outbox.clear()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await stream.aclose()
        self._outboxes.pop(peer, None)  # all are gone already when the service stops

    async def _answer(self) -> None:
        """Load what peers want, in the order the answering machine gives."""
        while True:
            self._turn = trio.Event()
            while True:
                await self._answers.acquire_on_behalf_of(token := object())
                answer = self._server.next()
                if answer is None:
                    self._answers.release_on_behalf_of(token)
                    break
                self._spawn(self._load, answer, token)
            await self._turn.wait()

    async def _load(self, answer: Answer, token: object) -> None:
        try:
            blocks = await self._in_thread(self._store.read_blocks, [modern(cid) for cid in answer.blocks])
        except DiskError as error:
            self._log.error("block.unreadable", peer=short(answer.peer), reason=str(error))
            blocks = [None] * len(answer.blocks)
        found = [(cid, data) for cid, data in zip(answer.blocks, blocks, strict=True) if data is not None]
        gone = [
            (cid, PresenceType.DONT_HAVE) for cid, data in zip(answer.blocks, blocks, strict=True) if data is None
        ]
        size = sum(len(data) for _, data in found)

        def sent(written: bool) -> None:
            self._answers.release_on_behalf_of(token)
            if written:
                self.served_to[answer.peer] += size
            self._server.done(answer.peer)
            self._turn.set()

        message = Message(
            blocks=tuple(Block(prefix=prefix_of(cid), data=data) for cid, data in found),
            presences=tuple(Presence(cid=cid, type=kind) for cid, kind in (*answer.presences, *gone)),
            pending_bytes=answer.pending_bytes,
        )
        self._outbox(answer.peer).answer(message, sent)

    # Streams in

    async def _receive(self, stream: Stream) -> None:
        """Read one peer's wishes and answers. Raises RemoteProtocolError, which ends the stream."""
        peer = stream.peer
        reader = MessageReader()
        whole = False
        try:
            while data := await stream.receive_some(RECEIVE_BYTES):
                self._client.handle(asking.Progress(peer), trio.current_time())
                for raw in reader.feed(data):
                    await self._take(peer, decode(raw))
            whole = not reader.pending
        except RemoteProtocolError as error:
            await self._handle(asking.Misbehaved(peer, f"broke the protocol: {error}"))
            raise
        finally:
            # Its answers came over this stream. If it still owes some, ask anew over a fresh pair of streams.
            # A guest opens a stream for every answer (go-bitswap does), so that the end of one says nothing.
            if self._client.owed(peer) and peer in self._outboxes and not (whole and self._is_guest(peer)):
                self._outboxes[peer].drop()

    def _is_guest(self, peer: PeerId) -> bool:
        return peer in self._guests or peer in self._host.guests

    def _may_have(self, peer: PeerId) -> bool:
        """Whether a peer gets our blocks."""
        if self._share_with_anyone or not (self._is_guest(peer) or peer in self._found):
            return True
        return self._share_with_guests and peer in self._guests

    async def _take(self, peer: PeerId, message: Message) -> None:
        if message.entries or message.full:
            self._server.handle(peer, message)
            self._turn.set()
        if message.blocks and peer in self._client.banned:
            raise RemoteProtocolError(f"{short(peer)} sends blocks although it was dropped")
        if message.blocks or message.presences:
            await self._to_verify.send((peer, message))

    async def _verify(self) -> None:
        """Hash what came and hand it to the asking machine."""
        async for peer, message in self._unverified:
            size = sum(len(block.data) for block in message.blocks)
            self.fetched_from[peer] += size
            if size > INLINE_BYTES:
                blocks = await self._in_thread(_identify, message.blocks)
            else:
                blocks = _identify(message.blocks)
            presences = [(presence.cid, presence.type) for presence in message.presences]
            await self._handle(asking.Arrived(peer, blocks, presences))

    # Tasks and threads

    def _spawn(self, task: Callable[[Unpack[Args]], Awaitable[object]], *args: *Args) -> None:
        if self._nursery is None:
            raise LocalProtocolError("the content service is not running")
        self._nursery.start_soon(task, *args)

    async def _in_thread(self, call: Callable[[Unpack[Args]], Result], *args: *Args) -> Result:
        return await self._workers.run(call, *args, limiter=self._threads)


def _remember(peers: dict[PeerId, None], peer: PeerId) -> None:
    peers[peer] = None
    if len(peers) > MAX_REMEMBERED:
        del peers[next(iter(peers))]


def _identify(blocks: Sequence[Block]) -> list[tuple[bytes | None, Buffer]]:
    return [(block.cid(), block.data) for block in blocks]
