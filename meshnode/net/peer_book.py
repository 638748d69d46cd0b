"""Who is connected, who is admitted, who is a guest, and who wants to be told of changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import trio

from meshnode.core.signal import Changes
from meshnode.net.inbox import Inbox
from meshnode.net.port import PeerEvent
from protocols.ids import PeerId

EVENT_ITEMS: Final = 4096  # a reader that is so far behind misses the oldest events


class PeerBook:
    """The book of peers that both hosts keep."""

    def __init__(self) -> None:
        self.admitted: set[PeerId] = set()
        self.links = Changes()  # see `Host.links`; the host tells of round trips
        self.guests: dict[PeerId, frozenset[str]] = {}  # and the protocols that each may use
        self._connected: set[PeerId] = set()
        self._readers: list[Inbox[PeerEvent]] = []
        self._guest_readers: list[Inbox[PeerEvent]] = []
        self._watchers: list[Callable[[PeerEvent], None]] = []

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._connected

    @property
    def connected(self) -> tuple[PeerId, ...]:
        """All but the guests."""
        return tuple(sorted(self._connected - self.guests.keys()))

    @property
    def connected_guests(self) -> tuple[PeerId, ...]:
        return tuple(sorted(self._connected & self.guests.keys()))

    def welcome(self, peer: PeerId, protocols: Iterable[str]) -> None:
        """Make a peer a guest. One that is connected already leaves for the readers of members and comes for the
        readers of guests."""
        changes = peer in self._connected and peer not in self.guests
        if changes:
            self._tell(PeerEvent(peer, connected=False, reason="it is a guest from now on"))
        self.guests[peer] = frozenset(protocols)
        if changes:
            self._tell(PeerEvent(peer, connected=True))

    def events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """A new reader of events, beginning with one per peer connected now; none is about a guest."""
        return _open_reader(self._readers, self.connected)

    def guest_events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """The same about guests alone."""
        return _open_reader(self._guest_readers, self.connected_guests)

    @property
    def readers(self) -> int:
        """How many still read; one that does not close its end is written to for ever."""
        return sum(not reader.abandoned for reader in (*self._readers, *self._guest_readers))

    def watch(self, watcher: Callable[[PeerEvent], None]) -> None:
        """Call `watcher` with every event, before any reader sees it. It must not block or raise."""
        self._watchers.append(watcher)

    def up(self, peer: PeerId) -> None:
        """The first connection to a peer came up; nothing happens for a further one."""
        if peer not in self._connected:
            self._connected.add(peer)
            self._tell(PeerEvent(peer, connected=True))

    def down(self, peer: PeerId, reason: str) -> None:
        """The last connection to a peer went away; nothing happens if there was none."""
        if peer in self._connected:
            self._connected.discard(peer)
            self._tell(PeerEvent(peer, connected=False, reason=reason))

    def _tell(self, event: PeerEvent) -> None:
        for watcher in self._watchers:
            watcher(event)
        self.links.notify()
        readers = self._guest_readers if event.peer in self.guests else self._readers
        readers[:] = [reader for reader in readers if not reader.abandoned]
        for reader in readers:
            reader.put(event)


def _open_reader(readers: list[Inbox[PeerEvent]], peers: Iterable[PeerId]) -> trio.MemoryReceiveChannel[PeerEvent]:
    reader = Inbox[PeerEvent](EVENT_ITEMS)
    readers.append(reader)
    for peer in peers:
        reader.put(PeerEvent(peer, connected=True))
    return reader.receive
