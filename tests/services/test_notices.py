"""What members tell everybody beside their adverts, between real directory services."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import Declined
from protocols.errors import LocalProtocolError
from protocols.notice.messages import DELTA, HOLDS_S, MAX_CONTENT_BYTES
from tests.services.directory_mesh import Mesh, Node, open_mesh

ROLES = ("serve", "train")


@pytest.fixture
async def mesh(rng: random.Random) -> AsyncIterator[Mesh]:
    async with open_mesh(rng) as made:
        yield made


async def hears(node: Node, *wanted: tuple[Node, bytes], within: float = 12) -> None:
    notices = node.directory.notices
    version = notices.changes.version
    with trio.fail_after(within):
        while notices.all(DELTA) != {teller.peer: word for teller, word in wanted}:
            version = await notices.changes.wait(version)


async def test_everybody_hears_it_and_the_newest_counts(mesh: Mesh, autojump_clock: MockClock) -> None:
    nodes = [await mesh.start(number, roles=ROLES) for number in (1, 2, 3)]
    await mesh.line(*nodes)
    nodes[0].directory.notices.give(DELTA, b"one")
    nodes[2].directory.notices.give(DELTA, b"three")
    for node in nodes:
        await hears(node, (nodes[0], b"one"), (nodes[2], b"three"))
    nodes[0].directory.notices.give(DELTA, b"two")
    nodes[2].directory.notices.give(DELTA, b"")
    for node in nodes:
        await hears(node, (nodes[0], b"two"))


async def test_it_outlives_a_restart_of_its_writer_and_of_all(mesh: Mesh, autojump_clock: MockClock) -> None:
    one, other = [await mesh.start(number, roles=ROLES) for number in (1, 2)]
    await mesh.line(one, other)
    one.directory.notices.give(DELTA, b"one")
    await hears(other, (one, b"one"))
    await one.stop()
    await other.stop()
    one, other = [await mesh.start(number, roles=ROLES) for number in (1, 2)]
    await mesh.line(one, other)
    await hears(other, (one, b"one"))


@pytest.mark.long
async def test_it_is_renewed_for_as_long_as_it_stands(mesh: Mesh, autojump_clock: MockClock) -> None:
    one, other = [await mesh.start(number, roles=ROLES) for number in (1, 2)]
    await mesh.line(one, other)
    one.directory.notices.give(DELTA, b"one")
    await hears(other, (one, b"one"))
    with trio.move_on_after(1.2 * HOLDS_S):
        version = other.directory.notices.changes.version
        while True:
            version = await other.directory.notices.changes.wait(version)
    assert other.directory.notices.all(DELTA) == {one.peer: b"one"}


async def test_who_lacks_the_role_is_told(mesh: Mesh, autojump_clock: MockClock) -> None:
    one = await mesh.start(1)
    with pytest.raises(Declined, match=r"lacks the role train.*--roles serve,train"):
        one.directory.notices.give(DELTA, b"one")


async def test_a_notice_has_a_limit(mesh: Mesh, autojump_clock: MockClock) -> None:
    one = await mesh.start(1, roles=ROLES)
    with pytest.raises(LocalProtocolError, match="16385 bytes; the limit is 16384"):
        one.directory.notices.give(DELTA, b"x" * (MAX_CONTENT_BYTES + 1))
