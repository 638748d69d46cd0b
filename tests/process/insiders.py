"""A member that misbehaves: a real node without layers that runs inside the test, whose parts are used otherwise."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from meshnode.assemble import assemble
from meshnode.cli.invite import make_ticket
from meshnode.config.load import load_config
from meshnode.harness.member import clean_environment
from meshnode.harness.mesh import Mesh
from meshnode.membership.identity import Identity
from meshnode.node import Node
from protocols.ids import PeerId
from tests.process.mesh_rig import READY_S, meshnode


@asynccontextmanager
async def insider(mesh: Mesh, data: Path, roles: tuple[str, ...]) -> AsyncIterator[Node]:
    """A member with these roles that knows everybody, and what is served."""
    owner = mesh.members[0]
    ticket = make_ticket(owner.folder, roles=roles, uses=1, ttl_s=600, addresses=[owner.address])
    joined = await trio.to_thread.run_sync(partial(meshnode, "join", ticket, folder=data))
    assert joined.code == 0, joined.errors
    flags = {"serve.memory": 0, "network.listen": ["/ip4/127.0.0.1/tcp/0"]}
    config = load_config(data, clean_environment(), flags)
    with ExitStack() as files:
        node = Node(assemble(config, Identity.load(data), files), config)
        async with trio.open_nursery() as nursery:
            await nursery.start(node.run)
            with trio.fail_after(READY_S):
                for member in mesh.members:
                    await node.membership.admitted(PeerId(member.peer_id))
                while node.releases.current is None:
                    await node.releases.changes.wait()
            yield node
            node.stopping.set()
            with trio.move_on_after(5, shield=True):
                await node.ended.wait()
            nursery.cancel_scope.cancel()
