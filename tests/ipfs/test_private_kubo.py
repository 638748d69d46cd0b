"""A private IPFS network with a swarm key: a real Kubo in it, and one outside."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
import trio

from meshnode.net.swarm_key import parse_swarm_key
from tests.ipfs.test_bitswap_kubo import LARGE, noise
from tests.ipfs.world import Ours, kubo, ours
from tests.process.mesh_rig import mesh_of, meshnode, small_model, tokens_of
from tests.refs import ref

pytestmark = [pytest.mark.ipfs, pytest.mark.slow]


def new_key() -> str:
    return f"/key/swarm/psk/1.0.0/\n/base16/\n{secrets.token_hex(32)}\n"


async def test_both_ways_with_the_same_key(tmp_path: Path) -> None:
    data, text = noise(LARGE), new_key()
    key = parse_swarm_key(text.encode())
    async with kubo(tmp_path / "kubo", swarm_key=text) as there:
        async with ours(tmp_path / "seeder", [there], share=True, swarm_key=key) as seeder:
            cid = seeder.add(tmp_path, data)
            assert await there.get(cid, tmp_path / "copy") == data
            assert await there.call("connect", seeder.host.addresses[0]) == 0
        async with ours(tmp_path / "leecher", [there], swarm_key=key) as leecher:
            assert (await leecher.content.open(ref(cid, len(data)))).path.read_bytes() == data
            assert await there.call("connect", leecher.host.addresses[0]) == 0  # it is dialled by Kubo as well


async def reason(node: Ours) -> str:
    """Why the one guest of a node is not connected, once that is known."""
    with trio.fail_after(60):
        while not node.guests.failures():  # noqa: ASYNC110 - no event tells it
            await trio.sleep(0.05)
    (why,) = node.guests.failures().values()
    assert node.host.guests == ()
    return why


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [("", new_key()), (new_key(), ""), (new_key(), new_key())],
    ids=["Kubo has one", "we have one", "two keys"],
)
async def test_a_kubo_with_another_key_or_none_is_refused(tmp_path: Path, mine: str, theirs: str) -> None:
    key = parse_swarm_key(mine.encode()) if mine else b""
    async with (
        kubo(tmp_path / "kubo", swarm_key=theirs) as there,
        ours(tmp_path / "node", [there], share=True, swarm_key=key, meet=False) as node,
    ):
        assert await there.call("connect", node.host.addresses[0]) != 0
        why = await reason(node)
        assert "can't be reached" in why
        assert ("this node has a swarm key (network.swarm_key)" in why) is bool(mine)


async def test_a_mesh_in_a_private_network(tmp_path: Path) -> None:
    """Members need the key, too; who joins has it from the same setting."""
    path = tmp_path / "swarm.key"
    path.write_text(new_key())
    model = small_model(tmp_path / "model")
    async with kubo(tmp_path / "kubo", swarm_key=path.read_text()) as there:
        settings = (
            ("network.swarm_key", str(path)),
            ("content.ipfs_peers", there.addresses[0]),
            ("content.share", "guests"),
        )
        with mesh_of(tmp_path, 3, published=model, settings=settings) as mesh:
            status = await trio.to_thread.run_sync(mesh.members[0].status)
            assert await there.call("pin", status.model.manifest) == 0
            answers = [await trio.to_thread.run_sync(tokens_of, member) for member in mesh.members]
            assert answers[0] == answers[1] == answers[2]
            await trio.to_thread.run_sync(mesh.down)
            path.write_text("something else")
            ran = await trio.to_thread.run_sync(lambda: meshnode("start", folder=mesh.members[0].folder))
            assert "is not the swarm.key of an IPFS network" in ran.sentence()
