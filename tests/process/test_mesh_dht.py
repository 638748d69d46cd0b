"""Two networks that know nothing of each other but one server of the DHT."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.net import heartbeat, pipes
from meshnode.net.lane import lane as direct
from meshnode.net.libp2p.gossip import MESHSUB
from meshnode.net.libp2p.host import Libp2pHost, open_host
from meshnode.net.libp2p.multistream import ADMITTED
from meshnode.net.libp2p.replacements import IDENTIFY, IDENTIFY_PUSH, PING
from protocols.bitswap.messages import PROTOCOL as BITSWAP
from protocols.ids import Cid, PeerId
from protocols.kad.messages import LAN_PROTOCOL
from protocols.kad.messages import PROTOCOL as KAD
from protocols.membership.messages import PROTOCOL as HELLO
from tests.dht_peer import dht_in_a_thread
from tests.process.mesh_rig import NO_COPIES, READY_S, mesh_of, meshnode, serving, small_model, tokens_of

pytestmark = [pytest.mark.process, pytest.mark.slow]

PROVIDE_S = 30.0
MEMBERS_ONLY = (heartbeat.PROTOCOL, direct.PROTOCOL, pipes.PROTOCOL, "/meshnode/sync/1", "/meshnode/intent/1")


@pytest.mark.long
def test_a_network_fetches_the_public_model_of_another(tmp_path: Path) -> None:
    published = small_model(tmp_path / "model")
    files = {path.read_bytes() for path in published.iterdir() if path.name != "index.json"}
    with dht_in_a_thread() as server:
        dht = ("content.dht", server)
        public = (dht, ("content.share", "anyone"))
        with mesh_of(tmp_path / "public", 1, published=published, settings=public) as giving:
            giver = giving.members[0]
            answer = tokens_of(giver)
            provided = giver.wait_for(
                lambda status: status.content.dht.provided > len(files),  # these and the manifest
                PROVIDE_S,
                "to name itself in the DHT for every file",
            )
            with mesh_of(tmp_path / "asking", 1, settings=(dht, *NO_COPIES)) as asking:
                asker = asking.members[0]
                manifest = Cid(provided.model.manifest)
                ran = meshnode("model", "add", f"ipfs://{manifest}", folder=asker.folder)
                assert ran.code == 0, ran.errors
                asking.wait_ready(READY_S)
                assert tokens_of(asker) == answer
                assert len(serving(asker.status())) == 1
                # Nobody is a member of another's network, or takes another for one.
                for member in (giver, asker):
                    status = member.status()
                    assert status.peers == () and status.refusals == ()
                assert giver.status().content.served_bytes >= sum(map(len, files))


async def test_strangers_get_blocks_and_nothing_else(tmp_path: Path) -> None:
    """What a stranger may use on the real wire, before and after it has been looked at."""
    published = small_model(tmp_path / "model")
    settings = (("content.share", "anyone"),)
    with mesh_of(tmp_path / "mesh", 1, published=published, settings=settings) as mesh:
        member = mesh.members[0]
        stranger = open_host(os.urandom(32))
        async with trio.open_nursery() as nursery:
            await nursery.start(stranger.run)
            await stranger.connect(member.peer_id, [member.address])
            offered = await allowed(stranger, member.peer_id)
            await trio.to_thread.run_sync(
                member.wait_for, lambda status: status.content.visitors == 1, READY_S, "to take it in"
            )
            assert offered == await allowed(stranger, member.peer_id) == {HELLO, BITSWAP, PING, IDENTIFY}
            nursery.cancel_scope.cancel()


async def allowed(stranger: Libp2pHost, peer: PeerId) -> set[str]:
    """Which of everything that a node serves to anybody is agreed on."""
    out = set()
    for protocol in (
        HELLO,
        BITSWAP,
        PING,
        IDENTIFY,
        IDENTIFY_PUSH,
        MESHSUB,
        ADMITTED,
        *MEMBERS_ONLY,
        KAD,
        LAN_PROTOCOL,
    ):
        try:
            stream = await stranger.open_stream(peer, protocol)
        except (Declined, PeerUnreachable):
            continue
        out.add(protocol)
        await stream.reset()
    return out
