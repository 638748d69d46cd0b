"""What a dial says when TCP connects and the handshake does not: two swarm keys, another program, another peer."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from meshnode.core.errors import PeerUnreachable
from meshnode.net.libp2p import dialler
from meshnode.net.libp2p.host import Libp2pHost, open_host
from tests.unit.membership_actors import peer_of_key

pytestmark = [pytest.mark.net, pytest.mark.process]

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))


@asynccontextmanager
async def running(swarm_key: bytes) -> AsyncIterator[Libp2pHost]:
    host = open_host(secrets.token_bytes(32), swarm_key=swarm_key)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        yield host
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("ours", "theirs"), [(b"", KEY), (KEY, b""), (KEY, OTHER_KEY)])
async def test_another_swarm_key_is_named_as_a_cause(
    monkeypatch: pytest.MonkeyPatch, ours: bytes, theirs: bytes
) -> None:
    monkeypatch.setattr(dialler, "CONNECT_S", 1.0)
    async with running(theirs) as there, running(ours) as here:
        with trio.fail_after(30), pytest.raises(PeerUnreachable, match=r"network\.swarm_key"):
            await here.connect(there.peer_id, there.addresses)


async def test_a_port_that_takes_the_connection_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialler, "CONNECT_S", 1.0)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, running(b"") as here:
        where = f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}"
        with trio.fail_after(30), pytest.raises(PeerUnreachable) as caught:
            await here.connect(peer_of_key("somebody"), [where])
    text = str(caught.value)
    assert f"{where}: it takes the connection and gives no libp2p handshake" in text and "network.swarm_key" in text


async def test_another_peer_has_nothing_to_do_with_swarm_keys() -> None:
    async with running(b"") as there, running(b"") as here:
        addresses = [address.partition("/p2p/")[0] for address in there.addresses]
        with trio.fail_after(30), pytest.raises(PeerUnreachable) as caught:
            await here.connect(peer_of_key("somebody"), addresses)
        assert "network.swarm_key" not in str(caught.value)
