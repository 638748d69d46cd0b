"""A release that was added by its CID: fetched again and again until it comes, announced once."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from meshnode.core.errors import ContentUnavailable, Declined
from meshnode.core.health import Health
from meshnode.services.releases import ArrivalService
from protocols.ids import DAG_CBOR, Cid, cid_of

MANIFEST = cid_of(DAG_CBOR, b"one")
OTHER = cid_of(DAG_CBOR, b"other")


class World:
    """What a node gives the service."""

    def __init__(self, absences: int) -> None:
        self.absences = absences
        self.waiting: tuple[Cid, str] | None = (MANIFEST, "")
        self.announced: list[tuple[Cid, str]] = []
        self.refuse = False
        self.health = Health(trio.current_time)
        self.asked: list[Cid] = []
        self.service = ArrivalService(
            waiting=lambda: self.waiting,
            fetch_block=self.fetch,
            announce=self.announce,
            forget=self.forget,
            health=self.health,
        )

    async def fetch(self, cid: Cid) -> bytes:
        self.asked.append(cid)
        await trio.sleep(30)
        if len(self.asked) <= self.absences:
            raise ContentUnavailable(f"nobody gave {cid}", cid=cid)
        return b""

    def announce(self, cid: Cid, variant: str) -> None:
        if self.refuse:
            raise Declined("no-model", "the manifest does not hold")
        self.announced.append((cid, variant))

    def forget(self) -> None:
        self.waiting = None


async def test_it_comes_at_the_third_attempt(autojump_clock: Any, nursery: trio.Nursery) -> None:
    world = World(absences=2)
    await nursery.start(world.service.run)
    assert world.service.awaited == MANIFEST
    await trio.sleep(45)
    (shown,) = world.health.current()
    assert shown.code == "manifest-missing" and MANIFEST in shown.text
    await trio.sleep(100)
    assert world.announced == [(MANIFEST, "")] and len(world.asked) == 3
    assert world.health.current() == [] and world.service.awaited is None


async def test_nothing_waits(autojump_clock: Any, nursery: trio.Nursery) -> None:
    world = World(absences=0)
    world.waiting = None
    await nursery.start(world.service.run)
    await trio.sleep(100)
    assert world.asked == []


@pytest.mark.parametrize("replacement", [None, (OTHER, "int8")], ids=["announced otherwise", "another one"])
async def test_what_was_replaced_on_the_way_is_not_announced(
    autojump_clock: Any, nursery: trio.Nursery, replacement: tuple[Cid, str] | None
) -> None:
    world = World(absences=0)
    await nursery.start(world.service.run)
    await trio.sleep(1)
    world.waiting = replacement
    await trio.sleep(100)
    assert world.announced == ([replacement] if replacement else [])


async def test_what_is_no_manifest_is_not_tried_again(autojump_clock: Any, nursery: trio.Nursery) -> None:
    world = World(absences=0)
    world.refuse = True
    await nursery.start(world.service.run)
    await trio.sleep(1000)
    assert world.announced == [] and len(world.asked) == 1 and world.service.awaited is None
