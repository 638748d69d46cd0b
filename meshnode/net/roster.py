"""Who is connected, who is admitted, and who wants to be told of changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from meshnode.net.inbox import Inbox
from meshnode.net.port import PeerEvent
from protocols.ids import PeerId

EVENT_ITEMS: Final = 4096  # a reader that is so far behind misses the oldest events


class Roster:
    """The book of peers that both hosts keep."""

    def __init__(self) -> None:
        self.admitted: set[PeerId] = set()
        self._connected: set[PeerId] = set()
        self._readers: list[Inbox[PeerEvent]] = []
        self._watchers: list[Callable[[PeerEvent], None]] = []

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._connected

    @property
    def connected(self) -> tuple[PeerId, ...]:
        return tuple(sorted(self._connected))

    def events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """A new reader of events, beginning with one per peer connected now."""
        reader = Inbox[PeerEvent](EVENT_ITEMS)
        self._readers.append(reader)
        for peer in self.connected:
            reader.put(PeerEvent(peer, connected=True))
        return reader.receive

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
        self._readers = [reader for reader in self._readers if not reader.abandoned]
        for watcher in self._watchers:
            watcher(event)
        for reader in self._readers:
            reader.put(event)
