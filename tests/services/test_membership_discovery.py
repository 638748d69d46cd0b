"""Membership and discovery together: from one address to a full mesh, and what strangers cost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import trio
from trio.testing import MockClock

from meshnode.core.health import Health
from meshnode.services.discovery import DiscoveryService
from tests.adverts import Known
from tests.services.membership_mesh import Node, open_mesh


async def discover(node: Node, nursery: trio.Nursery, seeds: Sequence[str], adverts: Known) -> DiscoveryService:
    service = DiscoveryService(
        node.host, node.database, adverts, seeds, Health(), random.Random(node.name), node.wall
    )
    await nursery.start(service.run)
    return service


async def full(nodes: Sequence[Node], within: float) -> None:
    """Wait until every node has admitted every other one."""
    with trio.fail_after(within):
        for node in nodes:
            for other in nodes:
                if other is not node:
                    await node.membership.admitted(other.peer_id)


async def test_nodes_find_each_other_over_one_seed(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with open_mesh(tmp_path) as mesh, trio.open_nursery() as nursery:
        ann = await mesh.found("ann")
        nodes = [ann, *[await mesh.enter(name, mesh.ticket(ann)) for name in ("bob", "cleo", "dan")]]
        adverts = Known()
        for node in nodes:
            await discover(node, nursery, [] if node is ann else ann.host.addresses, adverts)
        with trio.fail_after(2):
            for node in nodes[1:]:
                await node.membership.admitted(ann.peer_id)
        adverts.set({node.peer_id: node.host.addresses for node in nodes})
        await full(nodes, within=3)
        nursery.cancel_scope.cancel()


async def test_a_mesh_finds_itself_again_when_all_have_restarted(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with open_mesh(tmp_path) as mesh:
        ann = await mesh.found("ann")
        nodes = [ann, *[await mesh.enter(name, mesh.ticket(ann)) for name in ("bob", "cleo")]]
        async with trio.open_nursery() as nursery:
            adverts = Known()
            adverts.set({node.peer_id: node.host.addresses for node in nodes})
            for node in nodes:
                await discover(node, nursery, (), adverts)
            await full(nodes, within=10)
            nursery.cancel_scope.cancel()
        for node in nodes:
            await node.stop()
        nodes = [await mesh.start(name) for name in ("cleo", "ann", "bob")]
        async with trio.open_nursery() as nursery:
            for node in nodes:
                await discover(node, nursery, (), Known())
            await full(nodes, within=10)
            nursery.cancel_scope.cancel()


async def test_a_refused_node_is_not_dialled_in_a_loop_and_knows_why(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with open_mesh(tmp_path) as mesh, trio.open_nursery() as nursery:
        ann, eve = await mesh.found("ann"), await mesh.found("eve", network="elsewhere")
        service = await discover(eve, nursery, ann.host.addresses, Known())
        await trio.sleep(120)
        (refusal,) = ann.membership.refusals
        assert refusal.code == "other-network"
        assert 3 <= refusal.count <= 16
        assert "another network" in service.failures()[ann.peer_id]
        nursery.cancel_scope.cancel()
