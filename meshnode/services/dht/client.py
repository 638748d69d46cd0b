"""A client of the Kademlia DHT that IPFS nodes share: finds providers beyond our network, and names us as one.

Off unless the owner names DHT peers (`content.dht`). It only asks: it serves no DHT protocol, and says what it
provides only where it shares with anyone.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.net.port import Host
from meshnode.services.dht.network import KnownNetwork, networks_of
from meshnode.services.port import ExternalPeers, Inventory, Members
from protocols.backoff import Backoff
from protocols.errors import RemoteProtocolError
from protocols.ids import Cid, PeerId, cid_from_bytes, cid_to_bytes, short
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
    PROTOCOL,
    Kind,
    Message,
    MessageReader,
    Peer,
    block_key,
    decode,
    frame,
)

ASK_S: Final = 10.0  # one question with the dial before it
PROVIDE_S: Final = 12 * 3600.0  # records live for 48 h, and the peers that keep them come and go
RETRY_S: Final = 60.0  # until a record that nobody took is offered again
PROVIDING: Final = 2  # keys at the same time
LEAVING: Final = 6  # peers that get one key's record at the same time
REFRESH_S: Final = 600.0  # libp2p specs, kad-dht
FIRST_REFRESH_S: Final = 10.0  # the same while few peers are known; doubles
FIRST_PAUSE_S: Final = 2.0  # after nobody answered
LAST_PAUSE_S: Final = 60.0
MAX_PROVIDERS: Final = 8  # that we are connected to at the same time
WANTED: Final = 8  # providers that end a search
TRIAL_S: Final = 5.0  # that providers of other blocks are asked before a search
SEARCH_PAUSE_S: Final = 20.0  # between searches while a fetch still waits

Offer = Callable[[PeerId], Awaitable[None]]

_log = get_logger("dht")


@dataclass(frozen=True, slots=True, kw_only=True)
class DhtSettings:
    """Where the client begins, and what it grants."""

    seeds: tuple[str, ...]  # multiaddrs of DHT peers with /p2p/<peer id>
    protocols: tuple[str, ...] = ()  # what a found provider may use while we fetch from it


class DhtClient:
    """Searches the DHT for providers of blocks, and names us as one."""

    name = "dht"

    def __init__(
        self,
        host: Host,
        external: ExternalPeers,
        members: Members,
        settings: DhtSettings,
        rng: random.Random,
        *,
        shared: Inventory | None = None,
        health: Health | None = None,
    ) -> None:
        """
        Args:
          external: by which we are connected to strangers. Members are never asked and never found.
          shared: what anybody may have from us, and so what we provide; None: we provide nothing.

        Raises ConfigError for a seed whose peer id is not one.
        """
        self._host = host
        self._external = external
        self._members = members
        self._protocols = settings.protocols
        self._rng = rng
        self._shared = shared
        self._health = Health() if health is None else health
        self._networks = networks_of(settings.seeds, host.peer_id)
        self._providers: dict[PeerId, int] = {}  # connected, and by how many fetches each is used
        self._left = Changes()  # one of them has
        self._recent: dict[PeerId, Peer] = {}  # the last ones of them, oldest first
        self._provided: dict[tuple[str, Cid], int] = {}
        self._due: dict[tuple[str, Cid], float] = {}  # when a record is to be left again
        self._trouble: dict[PeerId, str] = {}  # of seeds
        self._searched: dict[Cid, dict[str, str]] = {}  # under way: by network, what the last search for a block gave
        self.changes = Changes()  # of `provided`

    @property
    def provided(self) -> dict[Cid, int]:
        """How many DHT peers took our record of a block the last time."""
        out: dict[Cid, int] = {}
        for (_, cid), count in self._provided.items():
            out[cid] = out.get(cid, 0) + count
        return out

    @property
    def known_peers(self) -> int:
        """DHT peers that have answered and are remembered."""
        return sum(len(network.table) for network in self._networks)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the tables and our records fresh until cancelled."""
        async with trio.open_nursery() as nursery:
            for network in self._networks:
                nursery.start_soon(self._refresh, network)
            if self._shared is not None:
                nursery.start_soon(self._provide_forever, self._shared)
            task_status.started()
            await trio.sleep_forever()

    # Searching

    async def find(self, cid: Cid, offer: Offer) -> None:
        """Find who has a block, connect to them, call `offer` for each that is connected; goes on until cancelled.

        No member and no configured peer is among them: those are asked without any search. Providers of other blocks
        that are still connected come first: whoever has one file of a model has others, as a rule.
        """
        self._searched.setdefault(cid, {})
        try:
            async with trio.open_nursery() as nursery:
                search = _Search(cid, offer, nursery)
                here = [peer for peer in self._recent.values() if peer.id in self._host.guests]
                for provider in here:
                    nursery.start_soon(self._connect, provider, search)
                if here:
                    await trio.sleep(TRIAL_S)
                while True:
                    async with trio.open_nursery() as walks:
                        for network in self._networks:
                            walks.start_soon(self._search, network, search)
                    await trio.sleep(SEARCH_PAUSE_S)
        finally:
            self._searched.pop(cid, None)

    def so_far(self, cid: Cid) -> str:
        """How the search for a block that is under way went until now, for the error when nobody gives it."""
        words = self._searched.get(cid, {})
        return "; ".join(
            words.get(network.name, f"the search in the DHT of {network.name} has not ended yet")
            for network in self._networks
        )

    def _note(self, network: KnownNetwork, cid: Cid, done: Done, providers: int) -> None:
        if providers:
            words = f"{providers} provider{'' if providers == 1 else 's'} found in the DHT of {network.name}"
        elif done.closest:
            words = f"no provider is named in the DHT of {network.name}"
        else:
            words = f"no DHT peer of {network.name} answers"
            if reasons := self._reasons(network):
                words += f" ({reasons})"
        if cid in self._searched:
            self._searched[cid][network.name] = words

    def _reasons(self, network: KnownNetwork) -> str:
        """Why its seeds do not answer."""
        return "; ".join(self._trouble[peer] for peer in network.seeds if peer in self._trouble)

    def _may_provide(self, peer: PeerId) -> bool:
        """Whether a peer is somebody to fetch from who is not asked anyway."""
        known = peer == self._host.peer_id or peer in self._external.configured
        return not known and not self._members.roles_of(peer)

    async def _search(self, network: KnownNetwork, search: _Search) -> None:
        """One walk through one network; what it finds is connected in the search's nursery."""
        key = block_key(cid_to_bytes(search.cid))
        nowhere: dict[PeerId, None] = {}  # named without an address
        found: set[PeerId] = set()

        def take(provider: Peer) -> None:
            if provider.id in search.busy or not self._may_provide(provider.id):
                return
            if not provider.addresses:
                nowhere[provider.id] = None
                return
            found.add(provider.id)
            search.busy.add(provider.id)
            search.nursery.start_soon(self._connect, provider, search)

        lookup, done = await self._walk(
            network, Lookup(Kind.GET_PROVIDERS, key, self._host.peer_id, _now(), wanted=WANTED), take
        )
        self._note(network, search.cid, done, len(found | search.busy))
        _log.debug("search.over", cid=short(search.cid), providers=len(found), reason=done.reason)
        # A record outlives the addresses that came with it; then the provider itself has to be looked for.
        for peer in [peer for peer in nowhere if peer not in found][:WANTED]:
            addresses = lookup.addresses(peer) or await self._locate(network, peer)
            if addresses:
                take(Peer(peer, addresses))

    async def _locate(self, network: KnownNetwork, peer: PeerId) -> tuple[str, ...]:
        walk = Lookup(Kind.FIND_NODE, peer_bytes(peer), self._host.peer_id, _now())
        await self._walk(network, walk)
        return walk.addresses(peer)

    async def _connect(self, provider: Peer, search: _Search) -> None:
        """Be connected to one provider until it leaves or we are cancelled."""
        peer = provider.id
        search.busy.add(peer)
        try:
            while peer not in self._providers and len(self._providers) >= MAX_PROVIDERS:
                await self._left.wait()
            self._providers[peer] = self._providers.get(peer, 0) + 1
            try:
                with self._host.guest_events() as events:
                    async with self._external.use(peer, _whole(provider), self._protocols):
                        _log.debug("provider.found", peer=peer)
                        self._recent.pop(peer, None)
                        self._recent[peer] = provider
                        if len(self._recent) > MAX_PROVIDERS:
                            del self._recent[next(iter(self._recent))]
                        await search.offer(peer)
                        while peer in self._host.guests:
                            await events.receive()
            except PeerUnreachable as error:
                _log.debug("provider.unreachable", peer=peer, reason=str(error))
            finally:
                self._providers[peer] -= 1
                if not self._providers[peer]:
                    del self._providers[peer]
                    self._left.notify()
        finally:
            search.busy.discard(peer)

    # Providing

    async def _provide_forever(self, shared: Inventory) -> None:
        networks = {network.protocol: network for network in self._networks}
        while True:
            version = shared.changes.version
            blocks: dict[Cid, None] = {}
            for holding in shared.holdings():
                blocks[Cid(holding.manifest)] = None
                blocks |= dict.fromkeys(map(cid_from_bytes, holding.cids))
            wanted = [(protocol, cid) for cid in blocks for protocol in networks]
            self._due = {name: self._due.get(name, 0.0) for name in wanted}
            self._provided = {name: count for name, count in self._provided.items() if name in self._due}
            ready = [name for name in wanted if self._due[name] <= _now()][:PROVIDING]
            if not ready:
                with trio.move_on_at(min(self._due.values(), default=float("inf"))):
                    await shared.changes.wait(version)
                continue
            async with trio.open_nursery() as nursery:
                for protocol, cid in ready:
                    nursery.start_soon(self._provide_one, networks[protocol], cid)

    async def _provide_one(self, network: KnownNetwork, cid: Cid) -> None:
        count = await self._provide(network, cid)
        # A record that fewer peers took is left again so much sooner.
        pause = max(RETRY_S, PROVIDE_S * min(count, K) / K * self._rng.uniform(0.9, 1.0))
        self._due[network.protocol, cid] = _now() + pause
        self._provided[network.protocol, cid] = count
        self.changes.notify()

    async def _provide(self, network: KnownNetwork, cid: Cid) -> int:
        """Leave our record with the peers nearest to a block; how many took it."""
        addresses = self._addresses(network)
        if not addresses:
            self._health.set("dht-no-address", network=network.name)
            return 0
        self._health.clear("dht-no-address", network=network.name)
        key = block_key(cid_to_bytes(cid))
        us = Peer(self._host.peer_id, addresses)
        _, done = await self._walk(network, Lookup(Kind.FIND_NODE, key, self._host.peer_id, _now()))
        record = Message(kind=Kind.ADD_PROVIDER, key=key, providers=(us,))
        taken = 0
        limiter = trio.CapacityLimiter(LEAVING)

        async def leave(peer: Peer) -> None:
            nonlocal taken
            try:
                async with limiter:
                    await self._converse(network, peer, record)
            except (PeerUnreachable, Declined, RemoteProtocolError) as error:
                _log.debug("record.refused", peer=peer.id, reason=str(error))
            else:
                taken += 1

        async with trio.open_nursery() as nursery:
            for peer in done.closest:
                nursery.start_soon(leave, peer)
        _log.debug("block.provided", cid=short(cid), peers=taken, reason=done.reason)
        return taken

    def _addresses(self, network: KnownNetwork) -> tuple[str, ...]:
        """Where others in a network find us; a name that our owner announces counts as public."""
        out = []
        for address in self._host.addresses:
            where = address.partition("/p2p/")[0]
            if network.takes(where) or (where.startswith("/dns") and network.protocol == PROTOCOL):
                out.append(where)
        return tuple(out[:MAX_ADDRESSES])

    # Walking

    async def _refresh(self, network: KnownNetwork) -> None:
        """Look for ourselves, which fills the table."""
        backoff = Backoff(FIRST_PAUSE_S, LAST_PAUSE_S)
        growth = Backoff(FIRST_REFRESH_S, REFRESH_S)
        while True:
            walk = Lookup(Kind.FIND_NODE, peer_bytes(self._host.peer_id), self._host.peer_id, _now())
            _, done = await self._walk(network, walk)
            if done.closest:
                backoff.reset()
                await trio.sleep(REFRESH_S if len(network.table) >= K else growth.next())
                continue
            self._health.set("dht-unreachable", network=network.name, reason=self._reasons(network) or done.reason)
            await trio.sleep(backoff.next(self._rng.random()))

    async def _walk(
        self, network: KnownNetwork, lookup: Lookup, found: Callable[[Peer], None] | None = None
    ) -> tuple[Lookup, Done]:
        """Drive one lookup to its end. `found`: called with each provider."""
        heard, events = trio.open_memory_channel[Event](MAX_UNDER_WAY)

        async def ask(peer: Peer) -> None:
            heard.send_nowait(await self._ask(network, peer, Message(kind=lookup.kind, key=lookup.key)))

        async with trio.open_nursery() as nursery:
            effects: tuple[Effect, ...] = lookup.handle(Begin(network.start_from(lookup.key)), _now())
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

    async def _ask(self, network: KnownNetwork, peer: Peer, question: Message) -> Event:
        """One question of a walk."""
        try:
            answer = await self._converse(network, peer, question)
            if answer is None or answer.kind is not question.kind:
                raise RemoteProtocolError(f"{short(peer.id)} did not answer the question")
        except (PeerUnreachable, Declined, RemoteProtocolError) as error:
            _log.debug("question.failed", peer=peer.id, reason=str(error))
            network.table.failed(peer.id)
            if peer.id in network.seeds:
                self._trouble[peer.id] = str(error)
            return Failed(peer.id)
        self._trouble.pop(peer.id, None)
        self._health.clear("dht-unreachable", network=network.name)
        network.table.answered(peer)
        return Answered(peer.id, network.dialable(answer.closer), network.dialable(answer.providers))

    async def _converse(self, network: KnownNetwork, peer: Peer, question: Message) -> Message | None:
        """One message to a peer, and its answer; None where the peer closed the stream without one.

        Raises PeerUnreachable, Declined, RemoteProtocolError.
        """
        if self._members.roles_of(peer.id):
            raise PeerUnreachable(f"{short(peer.id)} is a node of this network, which serves no DHT", peer=peer.id)
        with trio.move_on_after(ASK_S):
            async with self._external.use(peer.id, _whole(peer)):
                return await self._talk(network, peer.id, question)
        raise PeerUnreachable(f"{short(peer.id)} did not answer within {ASK_S:.0f} s", peer=peer.id)

    async def _talk(self, network: KnownNetwork, peer: PeerId, question: Message) -> Message | None:
        """The same with a peer that is connected, without a limit in time."""
        stream = await self._host.open_stream(peer, network.protocol)
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


@dataclass(slots=True, eq=False)
class _Search:
    """One call of `find`."""

    cid: Cid
    offer: Offer
    nursery: trio.Nursery  # of the connections to providers, which outlive a walk
    busy: set[PeerId] = field(default_factory=set)  # providers that are connected, dialled or waiting


def _whole(peer: Peer) -> tuple[str, ...]:
    """Its addresses with its id behind them, as a host takes them."""
    return tuple(f"{address}/p2p/{peer.id}" for address in peer.addresses)


def _now() -> float:
    return trio.current_time()
