"""Who brings nothing new is not listened to for a while."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from meshnode.net.bounded_taker import BoundedTaker
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId

ONE, OTHER = PeerId("one"), PeerId("other")


async def test_news_are_taken_however_many(autojump_clock: MockClock) -> None:
    taker = BoundedTaker(lambda giver, data: True, per_s=1.0, burst=3.0)
    assert all(taker(ONE, b"news") for _ in range(100))


async def test_beyond_the_limit_nothing_is_looked_at_until_time_has_passed(autojump_clock: MockClock) -> None:
    seen: list[tuple[PeerId, bytes]] = []

    def take(giver: PeerId, data: bytes) -> bool:
        seen.append((giver, data))
        if data == b"nonsense":
            raise RemoteProtocolError("that is no message")
        return data == b"news"

    taker = BoundedTaker(take, per_s=1.0, burst=3.0)
    for data in (b"known", b"nonsense", b"known", b"known", b"nonsense", b"news"):
        assert not taker(ONE, data)
    assert [data for _, data in seen] == [b"known", b"nonsense", b"known"]
    assert taker(OTHER, b"news"), "nobody else pays for it"
    await trio.sleep(1.5)
    assert taker(ONE, b"news"), "and it is over when it has ceased"
