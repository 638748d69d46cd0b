"""A member that misbehaves, against real nodes over real sockets: what its ticket gives it, and what no ticket does.

It is a real node without layers that runs inside the test; each case uses its parts otherwise than a node would.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from meshnode.core.clock import wall_ms
from meshnode.core.errors import Declined
from meshnode.harness.member import Member
from meshnode.harness.mesh import Mesh
from meshnode.node import Node
from meshnode.publisher.release import release
from protocols.advert.messages import HEAD, Announcement
from protocols.codec import encode
from tests.process.insiders import insider
from tests.process.mesh_rig import READY_S, mesh_of, meshnode, small_model, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process]

LAST = (1 << 63) - 1
NOWHERE = "bafyrei" + "a" * 52  # the CID of a manifest that nobody has


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("insider")
    with mesh_of(folder, 2, published=small_model(folder / "model"), memory=("1GB",)) as mesh:
        yield mesh


async def asked(member: Member) -> list[int]:
    return await trio.to_thread.run_sync(tokens_of, member)


async def said(node: Node, **fields: object) -> None:
    """A head in its own name, past everything that its own node checks; until it must have come everywhere."""
    head = Announcement(
        **{  # type: ignore[arg-type]
            "peer": node.identity.peer_id,
            "incarnation": wall_ms(),
            "sequence": 1,
            "created_ms": wall_ms(),
            "name": "nothing",
            "version": "v1.0.0-0",
            "manifest": NOWHERE,
            "variant": "int4",
            **fields,
        }
    )
    topic = f"/meshnode/records/{node.membership_file.network_id}"
    await node.host.publish(topic, node.identity.sign(HEAD, encode(head)))
    await trio.sleep(2)


def served(member: Member) -> str:
    model = member.status().model
    return "" if model is None else model.name


@pytest.mark.parametrize(
    "dates",
    [
        pytest.param({"created_ms": LAST}, marks=pytest.mark.long),
        {"incarnation": LAST, "sequence": LAST, "created_ms": LAST},
        pytest.param({}, marks=pytest.mark.long),
    ],
    ids=["the last day", "the last of everything", "today"],
)
async def test_a_model_that_nobody_has_replaces_nothing_whatever_its_date(
    mesh: Mesh, tmp_path: Path, dates: dict[str, int]
) -> None:
    owner, other = mesh.members
    usual = await asked(other)
    async with insider(mesh, tmp_path / "data", ("serve", "publish")) as node:
        await said(node, **dates)
        assert await asked(other) == usual
        serve = partial(meshnode, "model", "serve", "small-noise", folder=owner.folder)
        ran = await trio.to_thread.run_sync(serve)
        assert ran.code == 0, ran.errors
        assert await asked(other) == await asked(owner) == usual
    for member in mesh.members:
        await trio.to_thread.run_sync(lambda member=member: (member.stop(), member.wait_stopped()))
    await trio.to_thread.run_sync(mesh.up)
    await trio.to_thread.run_sync(mesh.wait_ready, READY_S)
    assert await asked(other) == usual, "and nothing of it comes back after a restart"


async def test_a_plain_ticket_publishes_nothing(mesh: Mesh, tmp_path: Path) -> None:
    owner, other = mesh.members
    async with insider(mesh, tmp_path / "data", ()) as node:
        identity = node.identity
        made = small_model(tmp_path / "guests", layers=4)

        def signed() -> str:
            cid, _ = release(
                made,
                node.store,
                identity.signing_key,
                created_ms=wall_ms(),
                publisher=identity.peer_id,
                name="guests",
            )
            return cid

        cid = await trio.to_thread.run_sync(signed)
        with pytest.raises(Declined, match="lacks the role publish"):
            node.releases.announce(cid, "int4")
        await said(node, manifest=cid, name="guests")
        health = await trio.to_thread.run_sync(lambda: [w.text for w in other.status().health])
        assert any("says which model the network serves, but lacks the role publish" in text for text in health)
        for member in (owner, other):
            assert await trio.to_thread.run_sync(served, member) == "small-noise"
