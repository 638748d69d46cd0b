"""The answering side: who provides a key, and who is nearer to it.

Rule 1: a peer may only provide for itself, and only keys that can name a block. No values are kept at all.
Rule 2: everything has a limit: records, records of one key, records of one peer; everything expires. While the limit
of a key or a peer is reached, who is there keeps its place. When the store is full, who has most in it makes room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from protocols.ids import PeerId
from protocols.kad.address import peer_bytes
from protocols.kad.lookup import K
from protocols.kad.messages import Kind, Message, Peer, is_multihash, place
from protocols.kad.table import Table

RECORD_SECONDS: Final = 48 * 3600.0  # libp2p specs, kad-dht: what the IPFS network keeps
MAX_RECORDS: Final = 1 << 15  # about 25 MB, if each is of another peer
MAX_ADDRESSES: Final = 4  # kept of a provider
MAX_KEY_RECORDS: Final = 32
MAX_PEER_RECORDS: Final = 4096
SWEEP_RECORDS: Final = 64  # looked at for expiry with every new one


@dataclass(slots=True)
class _Provider:
    addresses: tuple[str, ...]  # of its last record
    keys: set[bytes] = field(default_factory=set)


class ProviderStore:
    """Who provides what, and until when. Oldest first: a record that is renewed goes to the end."""

    def __init__(self, *, ttl: float = RECORD_SECONDS, capacity: int = MAX_RECORDS) -> None:
        self._ttl = ttl
        self._capacity = capacity
        self._records: dict[tuple[bytes, PeerId], float] = {}  # in order of their expiry
        self._keys: dict[bytes, dict[PeerId, None]] = {}
        self._providers: dict[PeerId, _Provider] = {}

    def __len__(self) -> int:
        return len(self._records)

    def add(self, key: bytes, provider: Peer, now: float) -> bool:
        """Keep a record, or renew it. False: a limit is reached."""
        self._sweep(now)
        name = (key, provider.id)
        known = self._providers.get(provider.id)
        if name not in self._records:
            count = 0 if known is None else len(known.keys)
            if len(self._keys.get(key, ())) >= MAX_KEY_RECORDS or count >= MAX_PEER_RECORDS:
                return False
            if len(self._records) >= self._capacity and not self._make_room(count + 1):
                return False
        addresses = provider.addresses[:MAX_ADDRESSES]
        if known is None:
            known = self._providers[provider.id] = _Provider(addresses)
        known.addresses = addresses
        known.keys.add(key)
        self._keys.setdefault(key, {})[provider.id] = None
        self._records.pop(name, None)
        self._records[name] = now + self._ttl
        return True

    def providers(self, key: bytes, now: float) -> tuple[Peer, ...]:
        """Who provides a key now; who said so first comes first."""
        found = (peer for peer in self._keys.get(key, ()) if self._records[key, peer] > now)
        return tuple(Peer(peer, self._providers[peer].addresses) for peer in found)

    def _make_room(self, count: int) -> bool:
        """Drop a record of the peer that has most, if that is more than `count`; so a few can't fill the store."""
        peer = max(self._providers, key=lambda one: len(self._providers[one].keys))
        if len(self._providers[peer].keys) <= count:
            return False
        self._drop(next(iter(self._providers[peer].keys)), peer)
        return True

    def _sweep(self, now: float) -> None:
        for _ in range(SWEEP_RECORDS):
            name = next(iter(self._records), None)
            if name is None or self._records[name] > now:
                return
            self._drop(*name)

    def _drop(self, key: bytes, peer: PeerId) -> None:
        del self._records[key, peer]
        del self._keys[key][peer]
        if not self._keys[key]:
            del self._keys[key]
        provider = self._providers[peer]
        provider.keys.discard(key)
        if not provider.keys:
            del self._providers[peer]


class Server:
    """Answers the questions of any peer."""

    def __init__(
        self,
        us: PeerId,
        table: Table,
        store: ProviderStore,
        addresses: Callable[[], tuple[str, ...]],
        takes: Callable[[str], bool],
    ) -> None:
        """
        Args:
          addresses: where we are.
          takes: whether an address may be passed on; see `Scope.takes`.
        """
        self._us = us
        self._table = table
        self._store = store
        self._addresses = addresses
        self._takes = takes

    def answer(self, sender: PeerId, message: Message, now: float) -> Message | None:
        """The answer; None where there is none: after ADD_PROVIDER, and to values, whose stream is reset."""
        match message.kind:
            case Kind.PING:
                return Message(kind=Kind.PING)
            case Kind.FIND_NODE:
                us = (Peer(self._us, self._addresses()),) if message.key == peer_bytes(self._us) else ()
                return Message(kind=message.kind, closer=us or self._closer(message.key, sender))
            case Kind.GET_VALUE:
                return Message(kind=message.kind, key=message.key, closer=self._closer(message.key, sender))
            case Kind.GET_PROVIDERS:
                providers = self._store.providers(message.key, now)
                return Message(
                    kind=message.kind,
                    key=message.key,
                    closer=self._closer(message.key, sender),
                    providers=providers,
                )
            case Kind.ADD_PROVIDER:
                self._add(sender, message, now)
        return None

    def _closer(self, key: bytes, sender: PeerId) -> tuple[Peer, ...]:
        return tuple(peer for peer in self._table.nearest(place(key), K + 1) if peer.id != sender)[:K]

    def _add(self, sender: PeerId, message: Message, now: float) -> None:
        if not is_multihash(message.key):
            return
        for provider in message.providers:
            addresses = tuple(address for address in provider.addresses if self._takes(address))
            if provider.id == sender and addresses:
                self._store.add(message.key, Peer(sender, addresses), now)
