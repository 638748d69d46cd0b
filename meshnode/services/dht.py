"""Finding and naming providers beyond the network, by the Kademlia DHT that IPFS nodes share.

Off unless the owner names DHT peers (`content.dht`). As a client this node only asks; it says what it provides only
where it shares with anyone; and it answers others only where the owner wants it to (`content.dht_serve`).
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import replace
from typing import Final, Protocol

import trio

from meshnode.core.errors import ConfigError, Declined, PeerUnreachable
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.net.port import Host, Stream
from protocols.errors import RemoteProtocolError
from protocols.ids import Cid, PeerId, cid_to_bytes, short
from protocols.kad.address import peer_bytes
from protocols.kad.lookup import (
    MAX_UNDER_WAY,
    Answered,
    Ask,
    Begin,
    Done,
    Effect,
    Event,
    Failed,
    Found,
    K,
    Lookup,
    Tick,
)
from protocols.kad.messages import (
    MAX_ADDRESSES,
    MAX_REQUEST_BYTES,
    PROTOCOL,
    Kind,
    Message,
    MessageReader,
    Peer,
    block_key,
    decode,
    frame,
    place,
)
from protocols.kad.scope import LAN, MACHINE, OPEN, Scope, scope_of
from protocols.kad.server import ProviderStore, Server
from protocols.kad.table import Table

ASK_SECONDS: Final = 10.0  # one question with the dial before it
PROVIDE_SECONDS: Final = 12 * 3600.0  # records live for 48 h, and the peers that keep them come and go
RETRY_SECONDS: Final = 60.0  # until a record that nobody took is offered again
LOOK_SECONDS: Final = 5.0  # between looks at what is to be provided
PROVIDING: Final = 2  # keys at once
LEAVING: Final = 6  # peers that are told of one key at once
REFRESH_SECONDS: Final = 600.0  # libp2p specs, kad-dht
FIRST_REST_SECONDS: Final = 5.0  # the same while few peers are known; doubles
FIRST_PAUSE_SECONDS: Final = 2.0  # after nobody answered; doubles
LAST_PAUSE_SECONDS: Final = 60.0
MAX_CARRIERS: Final = 8  # providers that we are connected to at once
WANTED: Final = 8  # providers that end a search
TRIAL_SECONDS: Final = 5.0  # that providers of other blocks are asked before a search
SEARCH_PAUSE_SECONDS: Final = 20.0  # between searches while a fetch still waits
IDLE_SECONDS: Final = 30.0  # an asker that says nothing for so long loses its stream
MAX_ASKERS: Final = 64  # streams with questions at once
MAX_MET: Final = 1024  # askers remembered that were asked whether they are servers

Offer = Callable[[PeerId], Awaitable[None]]

_log = get_logger("routing")


class Visiting(Protocol):
    """How to be connected to a peer for a while."""

    def visit(
        self, peer: PeerId, addresses: Sequence[str], protocols: Sequence[str] = ()
    ) -> AbstractAsyncContextManager[None]:
        """Raises PeerUnreachable."""


class _Region:
    """The DHT of one scope, as we know it."""

    def __init__(self, scope: Scope, us: PeerId) -> None:
        self.scope = scope
        self.seeds: dict[PeerId, Peer] = {}
        self.table = Table(us)
        self.store = ProviderStore()
        self.server: Server | None = None

    def start_from(self, key: bytes) -> tuple[Peer, ...]:
        """The peers to ask first."""
        nearest = self.table.nearest(place(key))
        return nearest if len(nearest) >= K else tuple({**self.seeds, **{p.id: p for p in nearest}}.values())


class RoutingService:
    """Searches the DHT for providers of blocks, names us as one, answers others."""

    name = "routing"

    def __init__(
        self,
        host: Host,
        visits: Visiting,
        is_known: Callable[[PeerId], bool],
        seeds: Sequence[str],
        carrier_protocols: Sequence[str],
        rng: random.Random,
        *,
        provides: Callable[[], Iterable[Cid]] = tuple,
        serve: bool = False,
        listen: Sequence[str] = (),
        health: Health | None = None,
    ) -> None:
        """Registers the protocols when it serves: make it before `host.run`.

        Args:
          is_known: members and guests of the configuration, which are asked for blocks without any search.
          seeds: multiaddrs of DHT peers with /p2p/<peer id>.
          carrier_protocols: what a found provider may use while we fetch from it.
          provides: the blocks that anybody may have from us; asked again and again.
          listen: where this node listens, as configured; on loopback alone, others on this machine count.

        Raises ConfigError for a seed whose peer id is none.
        """
        self._host = host
        self._visits = visits
        self._is_known = is_known
        self._carrier_protocols = tuple(carrier_protocols)
        self._rng = rng
        self._provides = provides
        self._health = Health() if health is None else health
        self._carriers: dict[PeerId, int] = {}  # and by how many fetches each is used
        self._place = trio.Event()  # one of them has left
        self._recent: dict[PeerId, Peer] = {}  # the last ones of them, oldest first
        self._askers = trio.CapacityLimiter(MAX_ASKERS)
        self._provided: dict[tuple[str, Cid], int] = {}
        self._due: dict[tuple[str, Cid], float] = {}  # when a record is to be left again
        self._trouble: dict[PeerId, str] = {}  # of seeds
        self._searched: dict[Cid, dict[str, str]] = {}  # under way: by scope, what the last search for a block gave
        self._met: dict[PeerId, float] = {}  # askers, and when each may be asked again; oldest first
        loopback = any(scope_of(address) is MACHINE for address in (*seeds, *listen))
        local = replace(LAN, loopback=loopback)
        scopes = [scope_of(address) for address in seeds]
        self._regions = [
            _Region(scope, host.peer_id)
            for scope in (OPEN, local)
            if serve or any(found.protocol == scope.protocol for found in scopes)
        ]
        for address, scope in zip(seeds, scopes, strict=True):
            where, _, name = address.rpartition("/p2p/")
            try:
                peer_bytes(PeerId(name))
            except RemoteProtocolError as error:
                raise ConfigError(f"content.dht: {address}: {error}.") from error
            region = next(r for r in self._regions if r.scope.protocol == scope.protocol)
            known = region.seeds.get(PeerId(name), Peer(PeerId(name)))
            region.seeds[known.id] = replace(known, addresses=(*known.addresses, where)[:MAX_ADDRESSES])
        for region in self._regions if serve else ():
            self._open(region)

    @property
    def provided(self) -> dict[Cid, int]:
        """How many DHT peers took our record of a block at last."""
        out: dict[Cid, int] = {}
        for (_, cid), count in self._provided.items():
            out[cid] = out.get(cid, 0) + count
        return out

    @property
    def known_peers(self) -> int:
        """DHT peers that have answered and are remembered."""
        return sum(len(region.table) for region in self._regions)

    @property
    def records(self) -> int:
        """Provider records that we keep for others."""
        return sum(len(region.store) for region in self._regions)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the tables and our records fresh until cancelled."""
        async with trio.open_nursery() as nursery:
            for region in self._regions:
                if region.seeds:
                    nursery.start_soon(self._refresh, region)
            nursery.start_soon(self._provide_forever)
            task_status.started()
            await trio.sleep_forever()

    # Searching

    async def bring(self, cid: Cid, offer: Offer) -> None:
        """Find who has a block, connect to them, call `offer` for each that is connected; goes on until cancelled.

        They are guests for so long, and nobody that `is_known` is among them. Providers of other blocks that are
        still connected come first: whoever has one file of a model has others, as a rule.
        """
        with self._told(cid):
            await self._bring(cid, offer)

    async def _bring(self, cid: Cid, offer: Offer) -> None:
        async with trio.open_nursery() as nursery:
            busy: set[PeerId] = set()

            async def carry(provider: Peer) -> None:
                busy.add(provider.id)
                try:
                    await self._carry(provider, offer)
                finally:
                    busy.discard(provider.id)

            here = [peer for peer in self._recent.values() if peer.id in self._host.guests]
            for provider in here:
                nursery.start_soon(carry, provider)
            if here:
                await trio.sleep(TRIAL_SECONDS)
            while True:
                async with trio.open_nursery() as searches:
                    for region in self._regions:
                        searches.start_soon(self._search, region, cid, busy, nursery, carry)
                await trio.sleep(SEARCH_PAUSE_SECONDS)

    def sought(self, cid: Cid) -> str:
        """How the search for a block that is under way went so far, for the error when nobody gives it."""
        words = self._searched.get(cid, {})
        return "; ".join(
            words.get(region.scope.name, f"the search in the DHT of {region.scope.name} has not ended yet")
            for region in self._regions
        )

    @contextmanager
    def _told(self, cid: Cid) -> Iterator[None]:
        """Keeps what `sought` tells, for so long."""
        self._searched.setdefault(cid, {})
        try:
            yield
        finally:
            self._searched.pop(cid, None)

    def _tell(self, region: _Region, cid: Cid, done: Done, providers: int) -> None:
        name = region.scope.name
        if providers:
            words = f"{providers} provider{'' if providers == 1 else 's'} found in the DHT of {name}"
        elif done.closest:
            words = f"no provider is named in the DHT of {name}"
        else:
            words = f"no DHT peer of {name} answers"
            if reasons := self._reasons(region):
                words += f" ({reasons})"
        if cid in self._searched:
            self._searched[cid][name] = words

    def _reasons(self, region: _Region) -> str:
        """Why its seeds do not answer."""
        return "; ".join(self._trouble[peer] for peer in region.seeds if peer in self._trouble)

    async def _search(
        self,
        region: _Region,
        cid: Cid,
        busy: set[PeerId],
        nursery: trio.Nursery,
        carry: Callable[[Peer], Awaitable[None]],
    ) -> None:
        key = block_key(cid_to_bytes(cid))
        homeless: dict[PeerId, None] = {}
        placed: set[PeerId] = set()

        def found(provider: Peer) -> None:
            if self._is_known(provider.id) or provider.id == self._host.peer_id or provider.id in busy:
                return
            if not provider.addresses:
                homeless[provider.id] = None
                return
            placed.add(provider.id)
            nursery.start_soon(carry, provider)

        for provider in region.store.providers(key, trio.current_time()):
            found(provider)
        lookup, done = await self._walk(
            region, Lookup(Kind.GET_PROVIDERS, key, self._host.peer_id, _now(), wanted=WANTED), found
        )
        self._tell(region, cid, done, len(placed | busy))
        _log.debug("search.over", cid=short(cid), providers=len(placed), reason=done.reason)
        # A record outlives the addresses that came with it; then the provider itself has to be looked for.
        for peer in [peer for peer in homeless if peer not in placed][:WANTED]:
            addresses = lookup.addresses(peer) or await self._locate(region, peer)
            if addresses:
                found(Peer(peer, addresses))

    async def _locate(self, region: _Region, peer: PeerId) -> tuple[str, ...]:
        walk = Lookup(Kind.FIND_NODE, peer_bytes(peer), self._host.peer_id, _now())
        await self._walk(region, walk)
        return walk.addresses(peer)

    async def _carry(self, provider: Peer, offer: Offer) -> None:
        """Have one provider as a guest until it leaves or we are cancelled."""
        peer = provider.id
        while peer not in self._carriers and len(self._carriers) >= MAX_CARRIERS:
            await self._place.wait()
        self._carriers[peer] = self._carriers.get(peer, 0) + 1
        try:
            with self._host.guest_events() as events:
                async with self._visits.visit(peer, _whole(provider), self._carrier_protocols):
                    _log.debug("provider.found", peer=peer)
                    self._recent.pop(peer, None)
                    self._recent[peer] = provider
                    if len(self._recent) > MAX_CARRIERS:
                        del self._recent[next(iter(self._recent))]
                    await offer(peer)
                    while peer in self._host.guests:
                        await events.receive()
        except PeerUnreachable as error:
            _log.debug("provider.unreachable", peer=peer, reason=str(error))
        finally:
            self._carriers[peer] -= 1
            if not self._carriers[peer]:
                del self._carriers[peer]
                self._place.set()
                self._place = trio.Event()

    # Providing

    async def _provide_forever(self) -> None:
        regions = {region.scope.protocol: region for region in self._regions}
        while True:
            wanted = [(protocol, cid) for cid in dict.fromkeys(self._provides()) for protocol in regions]
            self._due = {name: self._due.get(name, 0.0) for name in wanted}
            self._provided = {name: count for name, count in self._provided.items() if name in self._due}
            ready = [name for name in wanted if self._due[name] <= _now()][:PROVIDING]
            if not ready:
                await trio.sleep(LOOK_SECONDS)
                continue
            async with trio.open_nursery() as nursery:
                for protocol, cid in ready:
                    nursery.start_soon(self._provide_one, regions[protocol], cid)

    async def _provide_one(self, region: _Region, cid: Cid) -> None:
        count = await self._provide(region, cid)
        # A record that fewer peers took is left again so much sooner.
        pause = max(RETRY_SECONDS, PROVIDE_SECONDS * min(count, K) / K * self._rng.uniform(0.9, 1.0))
        self._due[region.scope.protocol, cid] = _now() + pause
        self._provided[region.scope.protocol, cid] = count

    async def _provide(self, region: _Region, cid: Cid) -> int:
        """Leave our record with the peers nearest to a block; how many took it."""
        addresses = self._addresses(region)
        if not addresses:
            self._health.set("dht-no-address", network=region.scope.name)
            return 0
        self._health.clear("dht-no-address", network=region.scope.name)
        key = block_key(cid_to_bytes(cid))
        us = Peer(self._host.peer_id, addresses)
        _, done = await self._walk(region, Lookup(Kind.FIND_NODE, key, self._host.peer_id, _now()))
        record = Message(kind=Kind.ADD_PROVIDER, key=key, providers=(us,))
        taken = 0
        if region.server is not None:
            taken += region.store.add(key, us, _now())

        limiter = trio.CapacityLimiter(LEAVING)

        async def leave(peer: Peer) -> None:
            nonlocal taken
            try:
                async with limiter:
                    await self._converse(region, peer, record)
            except (PeerUnreachable, Declined, RemoteProtocolError) as error:
                _log.debug("record.refused", peer=peer.id, reason=str(error))
            else:
                taken += 1

        async with trio.open_nursery() as nursery:
            for peer in done.closest:
                nursery.start_soon(leave, peer)
        _log.debug("block.provided", cid=short(cid), peers=taken, reason=done.reason)
        return taken

    def _addresses(self, region: _Region) -> tuple[str, ...]:
        """Where others in a region find us; a name that our owner announces counts as public."""
        out = []
        for address in self._host.addresses:
            where = address.partition("/p2p/")[0]
            if region.scope.takes(where) or (where.startswith("/dns") and region.scope.protocol == PROTOCOL):
                out.append(where)
        return tuple(out[:MAX_ADDRESSES])

    # Walking

    async def _refresh(self, region: _Region) -> None:
        """Look for ourselves, which fills the table."""
        pause, rest = FIRST_PAUSE_SECONDS, FIRST_REST_SECONDS
        while True:
            walk = Lookup(Kind.FIND_NODE, peer_bytes(self._host.peer_id), self._host.peer_id, _now())
            _, done = await self._walk(region, walk)
            if done.closest:
                pause = FIRST_PAUSE_SECONDS
                rest = REFRESH_SECONDS if len(region.table) >= K else min(2 * rest, REFRESH_SECONDS)
                await trio.sleep(rest)
                continue
            self._health.set(
                "dht-unreachable", network=region.scope.name, reason=self._reasons(region) or done.reason
            )
            await trio.sleep(pause * self._rng.uniform(0.5, 1.0))
            pause = min(2 * pause, LAST_PAUSE_SECONDS)

    async def _walk(
        self, region: _Region, lookup: Lookup, found: Callable[[Peer], None] | None = None
    ) -> tuple[Lookup, Done]:
        """Drive one lookup to its end. `found`: called with each provider."""
        heard, events = trio.open_memory_channel[Event](MAX_UNDER_WAY)

        async def ask(peer: Peer) -> None:
            heard.send_nowait(await self._ask(region, peer, Message(kind=lookup.kind, key=lookup.key)))

        async with trio.open_nursery() as nursery:
            effects: tuple[Effect, ...] = lookup.handle(Begin(region.start_from(lookup.key)), _now())
            while True:
                for effect in effects:
                    match effect:
                        case Ask(peer):
                            nursery.start_soon(ask, peer)
                        case Found(provider):
                            if found is not None:
                                found(provider)
                        case Done():
                            nursery.cancel_scope.cancel()
                            return lookup, effect
                event: Event = Tick()
                with trio.move_on_at(float("inf") if lookup.deadline is None else lookup.deadline):
                    event = await events.receive()
                effects = lookup.handle(event, _now())

    async def _ask(self, region: _Region, peer: Peer, question: Message) -> Event:
        """One question of a walk."""
        try:
            answer = await self._converse(region, peer, question)
            if answer is None or answer.kind is not question.kind:
                raise RemoteProtocolError(f"{short(peer.id)} did not answer the question")
        except (PeerUnreachable, Declined, RemoteProtocolError) as error:
            _log.debug("question.failed", peer=peer.id, reason=str(error))
            region.table.failed(peer.id)
            if peer.id in region.seeds:
                self._trouble[peer.id] = str(error)
            return Failed(peer.id)
        self._trouble.pop(peer.id, None)
        self._health.clear("dht-unreachable", network=region.scope.name)
        region.table.answered(peer)
        return Answered(peer.id, _within(region.scope, answer.closer), _within(region.scope, answer.providers))

    async def _converse(self, region: _Region, peer: Peer, question: Message) -> Message | None:
        """One message to a peer, and its answer; None where the peer closed the stream without one.

        Raises PeerUnreachable, Declined, RemoteProtocolError.
        """
        with trio.move_on_after(ASK_SECONDS):
            async with self._visits.visit(peer.id, _whole(peer)):
                return await self._talk(region, peer.id, question)
        raise PeerUnreachable(f"{short(peer.id)} did not answer within {ASK_SECONDS:.0f} s", peer=peer.id)

    async def _talk(self, region: _Region, peer: PeerId, question: Message) -> Message | None:
        """The same with a peer that is connected, without a limit in time."""
        stream = await self._host.open_stream(peer, region.scope.protocol)
        try:
            await stream.send_all(frame(question))
            await stream.send_eof()
            reader = MessageReader()
            while data := await stream.receive_some():
                for raw in reader.feed(data):
                    return decode(raw)
            if reader.pending:
                raise RemoteProtocolError(f"{short(peer)} broke off in the middle of its answer")
            return None
        except BaseException:
            with trio.CancelScope(shield=True, deadline=_now() + 1):
                await stream.reset()
            raise
        finally:
            with trio.CancelScope(shield=True, deadline=_now() + 1):
                await stream.aclose()

    # Answering

    def _open(self, region: _Region) -> None:
        server = region.server = Server(
            self._host.peer_id, region.table, region.store, lambda: self._addresses(region), region.scope.takes
        )

        async def answer(stream: Stream) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._meet, region, stream.peer)
                await self._answer(server, stream)

        self._host.handle(region.scope.protocol, answer, open_to_strangers=True)

    async def _meet(self, region: _Region, peer: PeerId) -> None:
        """An asker may be a server, too: then it answers, for a start, who and where it is."""
        now = _now()
        if peer in region.table or now < self._met.get(peer, now):
            return
        self._met.pop(peer, None)
        self._met[peer] = now + REFRESH_SECONDS
        if len(self._met) > MAX_MET:
            del self._met[next(iter(self._met))]
        try:
            with trio.move_on_after(ASK_SECONDS):
                question = Message(kind=Kind.FIND_NODE, key=peer_bytes(peer))
                answer = await self._talk(region, peer, question)
                for said in _within(region.scope, () if answer is None else answer.closer):
                    if said.id == peer:
                        region.table.answered(said)
        except (PeerUnreachable, Declined, RemoteProtocolError) as error:
            _log.debug("asker.unmet", peer=peer, reason=str(error))

    async def _answer(self, server: Server, stream: Stream) -> None:
        """Read questions until the asker ends the stream. Raises RemoteProtocolError, which ends it, too."""
        try:
            self._askers.acquire_on_behalf_of_nowait(stream)
        except trio.WouldBlock:
            raise Declined("busy", f"{MAX_ASKERS} peers ask at once", peer=stream.peer) from None
        try:
            reader = MessageReader(MAX_REQUEST_BYTES)
            while True:
                data = b""
                with trio.move_on_after(IDLE_SECONDS):
                    data = await stream.receive_some()
                if not data:
                    return
                for raw in reader.feed(data):
                    question = decode(raw)
                    if question.kind is Kind.PUT_VALUE:
                        raise RemoteProtocolError(f"{short(stream.peer)} wants a value kept; this node keeps none")
                    answer = server.answer(stream.peer, question, _now())
                    if answer is not None:
                        await stream.send_all(frame(answer))
        finally:
            self._askers.release_on_behalf_of(stream)


def _within(scope: Scope, peers: Iterable[Peer]) -> tuple[Peer, ...]:
    """The same peers with those addresses alone that may be dialled on a stranger's word."""
    return tuple(
        Peer(peer.id, tuple(address for address in peer.addresses if scope.takes(address))) for peer in peers
    )


def _whole(peer: Peer) -> tuple[str, ...]:
    """Its addresses with its id behind them, as a host takes them."""
    return tuple(f"{address}/p2p/{peer.id}" for address in peer.addresses)


def _now() -> float:
    return trio.current_time()
