"""A channel that never makes its writer wait: above its limit the oldest item is dropped."""

from __future__ import annotations

from typing import Final, Generic, TypeVar

import trio

T = TypeVar("T")

INBOX_ITEMS: Final = 256


class Inbox(Generic[T]):
    """Written by the host, read by one service through `receive`."""

    def __init__(self, items: int = INBOX_ITEMS) -> None:
        self._send, self.receive = trio.open_memory_channel[T](items)
        self._oldest = self.receive.clone()  # takes what must make room; also keeps the channel open for `put`
        self.dropped = 0

    @property
    def abandoned(self) -> bool:
        """Whether the reader has closed its end."""
        return self.receive.statistics().open_receive_channels < 2

    def put(self, item: T) -> None:
        while True:
            try:
                self._send.send_nowait(item)
                return
            except trio.WouldBlock:
                self._oldest.receive_nowait()
                self.dropped += 1
