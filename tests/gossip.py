"""What a host hears of a topic, for tests."""

from __future__ import annotations

import math

import trio

from meshnode.net.port import Host, Take
from protocols.ids import PeerId


def anything(_forwarder: PeerId, _data: bytes) -> bool:
    return True


def inbox_of(host: Host, topic: str, judge: Take = anything) -> trio.MemoryReceiveChannel[tuple[PeerId, bytes]]:
    """What a host hears and `judge` finds good."""
    heard, inbox = trio.open_memory_channel[tuple[PeerId, bytes]](math.inf)

    def take(forwarder: PeerId, data: bytes) -> bool:
        good = judge(forwarder, data)
        if good:
            heard.send_nowait((forwarder, data))
        return good

    host.subscribe(topic, take)
    return inbox
