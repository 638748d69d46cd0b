"""Who holds which files of the models that the network has announced, and which of ours must stay."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from meshnode.policy.duty import Duty, duty_of
from meshnode.policy.replication import Shelf, Standing, standing
from meshnode.services.port import Adverts, Inventory
from meshnode.store.port import LAST_PIN, SPARE_PIN, Content
from protocols.advert.messages import DRAINING, Advert, Holding
from protocols.ids import DAG_CBOR, Cid, PeerId, cid_from_bytes

HANDOVER: Final = "handing-over"  # tag of a node that leaves and holds what nobody else does

_MANIFEST: Final = bytes((1, DAG_CBOR))  # begins the CID of one

_text_of = lru_cache(maxsize=8192)(cid_from_bytes)


class Shelves:
    """What every node holds, taken from the adverts; ours as it is, not as our last advert says."""

    def __init__(self, us: PeerId, adverts: Adverts, inventory: Inventory, store: Content) -> None:
        """`store`: where what must stay is pinned."""
        self.us = us
        self.adverts = adverts
        self.inventory = inventory
        self._store = store
        self._names: dict[PeerId, tuple[tuple[Holding, ...], frozenset[bytes]]] = {}  # of each advert, taken apart
        self._pinned: dict[Standing, frozenset[Cid]] = {}
        self._judged: object = None
        self.resting = False  # our owner has us make no copies, as of the last `all`

    def all(self) -> list[Shelf]:
        """Everybody's but of those who are about to leave; ours is the last."""
        live = self.adverts.live()
        self._names = {peer: names for peer, names in self._names.items() if peer in live}
        shelves = [
            Shelf(
                peer,
                self._names_of(peer, advert.holdings),
                advert.disk_free_bytes if duty_of(advert.tags).background else 0,
                steady="battery" not in advert.tags,
            )
            for peer, advert in live.items()
            if peer != self.us and not _goes(advert)
        ]
        me = live.get(self.us)
        battery = me is not None and "battery" in me.tags
        ours = self._names_of(self.us, self.inventory.holdings())
        self.resting = me is not None and not duty_of(me.tags).background
        room = 0 if self.resting else self._store.usage().room_bytes
        return [*shelves, Shelf(self.us, ours, room, steady=not battery)]

    def urgent(self) -> bool:
        """Whether somebody waits until others hold what it alone has."""
        return any(HANDOVER in advert.tags for advert in self.adverts.live().values())

    def protect(self, shelves: list[Shelf], replicas: int) -> None:
        """Pin what must not be evicted here: it outlives a restart, when we know of nobody yet."""
        holders = [(shelf.peer, shelf.files) for shelf in shelves]
        if holders == self._judged:
            return
        self._judged = holders
        pins: dict[Standing, set[Cid]] = {Standing.LAST: set(), Standing.SPARE: set(), Standing.FREE: set()}
        for name in shelves[-1].files:
            others = [peer for peer, files in holders if peer != self.us and name in files]
            manifest = name.startswith(_MANIFEST)  # small, and without it a restart knows of no file
            what = Standing.LAST if manifest else standing(name, self.us, others, replicas)
            pins[what].add(_text_of(name))
        for kind, pin in ((Standing.LAST, LAST_PIN), (Standing.SPARE, SPARE_PIN)):
            if self._pinned.get(kind) != frozenset(pins[kind]):
                self._store.pin_only(pin, pins[kind])
                self._pinned[kind] = frozenset(pins[kind])

    def protect_new(self, cid: Cid) -> None:
        """A file that has just come stays until it is known who else holds it."""
        self._store.pin(cid, LAST_PIN)
        self._pinned.pop(Standing.LAST, None)
        self._judged = None
        self.inventory.look()

    def _names_of(self, peer: PeerId, holdings: tuple[Holding, ...]) -> frozenset[bytes]:
        """The same set as long as it says the same: an advert is renewed far more often than it changes."""
        known = self._names.get(peer)
        if known is None or known[0] != holdings:
            known = (holdings, frozenset(name for holding in holdings for name in holding.cids))
        else:
            known = (holdings, known[1])
        self._names[peer] = known
        return known[1]


def _goes(advert: Advert) -> bool:
    """Whether a node is about to leave and takes its copies with it."""
    stays = duty_of(advert.tags) is Duty.DRAINED  # it gives its layers away and keeps its files
    drains = advert.serving is not None and advert.serving.state == DRAINING
    return HANDOVER in advert.tags or (drains and not stays)
