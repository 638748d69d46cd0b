"""Whom a fetch asks, one after the other: members, guests, peers that a search finds, sources outside the mesh."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import trio

from meshnode.core.errors import ContentUnavailable
from meshnode.net.port import Host
from meshnode.services.content import escalation
from meshnode.services.content.outside import Outside, Search
from meshnode.services.content.session import Session
from meshnode.services.port import Adverts, Guests
from protocols.ids import DAG_CBOR, Cid, PeerId, cid_codec

MAX_REMEMBERED: Final = 4096  # peers that were found


MEMBERS_ASKED: Final = 8  # for what nobody says that he has


class Finder(Protocol):
    """Looks for peers outside the network (`dht.py`)."""

    async def find(self, cid: Cid, offer: Callable[[PeerId], Awaitable[None]]) -> None:
        """Call `offer` with peers that may have a block and are connected, until cancelled."""

    def so_far(self, cid: Cid) -> str:
        """How that goes, for the error when nobody gives it."""


class Sources:
    """Everybody who may have a block."""

    def __init__(
        self,
        host: Host,
        adverts: Adverts,
        guests: Guests,
        *,
        finder: Finder | None = None,
        outside: Outside | None = None,
        patience_s: float | None = None,
    ) -> None:
        """
        Args:
          finder: asked when nobody known gives a block.
          outside: asked for what no peer gives.
          patience_s: without a verified block until a fetch gives up; None: as the finder needs it.
        """
        self._host = host
        self._adverts = adverts
        self._guests = guests
        self._finder = finder
        self._outside = outside
        self.patience_s = patience_s or (escalation.PATIENCE_S if finder is None else escalation.SEARCH_PATIENCE_S)
        self._found: dict[PeerId, None] = {}  # by the finder, oldest first

    def asking(self, session: Session) -> Asking:
        """Everybody, asked for one fetch."""
        search = None if self._outside is None else Search(session, self._outside, self)
        return Asking(self, session, search)

    def outside_after_s(self, session: Session) -> float:
        """Seconds without a block until sources outside the mesh are asked; 0 where nobody else could have it."""
        guests = not set(self._guests.configured).isdisjoint(self._host.guests)
        return escalation.outside_after_s(session.exchange.online_s, others=guests or bool(self._providers(session)))

    def advice(self, cid: Cid) -> str:
        """What our owner may not know when nobody gives a manifest: it may be on IPFS."""
        asks = self._guests.configured or self._finder is not None or self._outside is not None
        if cid_codec(cid) != DAG_CBOR or asks:
            return ""
        return (
            ", or name IPFS nodes that have it in content.ipfs_peers or peers of their DHT in content.dht: this node "
            "asks nobody outside its network now"
        )

    def so_far(self, cid: Cid) -> str:
        """How the search for peers goes."""
        return "" if self._finder is None else self._finder.so_far(cid)

    async def offer_forever(self, session: Session) -> None:
        """Tell the session who may have it, again and again."""
        while True:
            providers = self._providers(session)
            await session.offer(providers)
            if (not providers or session.quiet_s >= escalation.GUEST_S) and self._guests.configured:
                await session.consult(sorted(self._guests.configured))
            if not providers:  # adverts name the files of announced releases alone
                await session.consult(self._host.peers[:MEMBERS_ASKED])
            await trio.sleep(escalation.OFFER_S)

    async def seek(self, session: Session) -> None:
        """Once nobody has given a block for a while: have peers looked for, and ask them."""
        if self._finder is None:
            return
        quiet = 0.0
        while quiet < escalation.SEEK_S and self._found.keys().isdisjoint(self._host.guests):
            await trio.sleep(escalation.SEEK_S - quiet)
            quiet = session.quiet_s

        async def offer(peer: PeerId) -> None:
            self._found[peer] = None
            if len(self._found) > MAX_REMEMBERED:
                del self._found[next(iter(self._found))]
            await session.consult((peer,))

        await self._finder.find(session.root, offer)

    def _providers(self, session: Session) -> tuple[PeerId, ...]:
        us = self._host.peer_id
        return session.usable(peer for peer in self._adverts.providers(session.root) if peer != us)


class Asking:
    """One fetch asks around, beside whoever takes in what comes."""

    def __init__(self, sources: Sources, session: Session, search: Search | None) -> None:
        self._sources = sources
        self._session = session
        self._search = search

    async def run(self) -> None:
        """Until cancelled. Start it in a nursery of its own session."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sources.offer_forever, self._session)
            nursery.start_soon(self._sources.seek, self._session)
            if self._search is not None:
                nursery.start_soon(self._search.run)
            await trio.sleep(math.inf)

    @property
    def hopeful(self) -> bool:
        """Whether somebody owes us something and is busy with blocks for other fetches."""
        exchange = self._session.exchange
        recent = trio.current_time() - exchange.last_block_at < self._sources.patience_s
        return recent and self._session.owed

    def unavailable(self) -> ContentUnavailable:
        """The error that says who was asked and how that went."""
        cid, words = self._session.root, self._session.words()
        asked = "; asked were: " + ", ".join(words) if words else "; no peer is known to hold it"
        searches = (self._search.trouble if self._search is not None else "", self._sources.so_far(cid))
        how = "".join(f"; {words}" for words in searches if words)
        return ContentUnavailable(
            f"nobody gave {cid} for {self._sources.patience_s:.0f} s{asked}{how}. Start a node that holds it "
            "(`meshnode status` shows who holds what) and ask again"
            f"{self._sources.advice(cid)}; what has come so far is kept",
            cid=cid,
        )
