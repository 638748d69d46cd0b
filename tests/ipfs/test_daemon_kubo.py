"""An operator's Kubo as a guest: found through its RPC, used over Bitswap both ways; and one that hangs.

The packaged Kubo has no RPC, so that a scripted one speaks for it here; what moves over Bitswap is the real one's.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import trio

from meshnode.core.health import Health
from meshnode.ipfs.rpc import IpfsApi
from meshnode.services import external_peers as guest_service
from meshnode.services.ipfs_daemon import IpfsDaemonService, Publication
from meshnode.state.database import Database
from protocols.ids import cid_of_old
from tests.http_server import site
from tests.ipfs.world import kubo, ours
from tests.refs import ref
from tests.services.test_content import MIB, noise
from tests.services.test_ipfs_daemon import FakeDaemon, Model, Us

pytestmark = [pytest.mark.ipfs, pytest.mark.slow]


async def test_the_operators_kubo_gets_and_gives_blocks(tmp_path: Path) -> None:
    ours_alone, theirs_alone = noise(20 * MIB, 1), noise(20 * MIB, 2)
    (tmp_path / "theirs").write_bytes(theirs_alone)
    async with kubo(tmp_path / "kubo") as there, ours(tmp_path / "node", share=True) as node:
        name = await there.call("add", str(tmp_path / "theirs"))
        health = Health()
        with site(FakeDaemon(there.peer, there.addresses[0])) as rpc, Database(tmp_path / "state") as records:
            api = IpfsApi(rpc.multiaddr, health)
            publication = Publication(api, node.store, records, health, held=Model(), releases=None)
            service = IpfsDaemonService(api, node.host, node.guests, Us(), publication, health)
            async with trio.open_nursery() as nursery:
                await nursery.start(service.run)
                await node.met(there.peer)
                assert await there.get(node.add(tmp_path, ours_alone), tmp_path / "copy") == ours_alone
                opened = await node.content.open(ref(cid_of_old(name), len(theirs_alone)))
                assert opened.path.read_bytes() == theirs_alone
                assert node.content.served_to[there.peer] >= len(ours_alone)
                nursery.cancel_scope.cancel()
        assert health.current() == []


@pytest.mark.long
async def test_a_kubo_that_hangs_is_let_go_and_met_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_service, "LAST_PAUSE_S", 2.0)
    async with kubo(tmp_path / "kubo") as there, ours(tmp_path / "node", [there]) as node:
        events = node.host.guest_events()
        assert (await events.receive()).connected
        there.process.send_signal(signal.SIGSTOP)
        try:
            with trio.fail_after(30):
                event = await events.receive()
            assert not event.connected and event.reason.startswith("no heartbeat")
        finally:
            there.process.send_signal(signal.SIGCONT)
        await node.met(there.peer)
