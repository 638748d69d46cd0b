"""A content service that stands alone: what a directory, a membership and settings would tell it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshnode.core.health import Health
from meshnode.core.signal import Changes
from meshnode.core.workers import Threads
from meshnode.net.port import Host
from meshnode.services.content.access import Access
from meshnode.services.content.outside import Outside
from meshnode.services.content.service import ContentService
from meshnode.services.content.sources import Finder, Sources
from meshnode.services.port import Guests
from meshnode.store.port import Store
from protocols.advert.messages import Advert
from protocols.ids import Cid, PeerId


class Known:
    """Which peers there are: providers of everything, guests, and for the rest members."""

    def __init__(self, host: Host, providers: Sequence[PeerId] = (), guests: Sequence[PeerId] = ()) -> None:
        """`providers`: looked at whenever somebody asks."""
        self._host = host
        self._providers = providers
        self.configured = tuple(guests)
        self.changes = Changes()

    def live(self) -> Mapping[PeerId, Advert]:
        return {}

    def providers(self, cid: Cid) -> Sequence[PeerId]:
        return tuple(self._providers)

    def roles_of(self, peer: PeerId) -> frozenset[str]:
        return frozenset(() if peer in self.configured or peer in self._host.guests else ("serve",))


def content_of(
    host: Host,
    store: Store,
    known: Known,
    *,
    guests: Guests | None = None,
    share: str = "members",
    patience_s: float = 30.0,
    finder: Finder | None = None,
    outside: Outside | None = None,
) -> ContentService:
    """A content service to be run. `guests`: in the place of those that are `known`."""
    named = known if guests is None else guests
    sources = Sources(host, known, named, finder=finder, outside=outside, patience_s=patience_s)
    return ContentService(host, store, known, sources, Access(share, known, named), Health(), Threads())
