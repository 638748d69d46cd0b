"""`network.announce`: what others are told instead of the addresses that this machine finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from meshnode.cli.invite import addresses
from meshnode.config.load import load_config
from meshnode.core.errors import ConfigError
from meshnode.membership.enrolment import init_network, own_peer
from meshnode.net.libp2p.host import Libp2pHost, open_host
from protocols.multiaddr import owned, parse_address

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


def test_it_is_a_list_of_addresses_without_owners(tmp_path: Path) -> None:
    environ = {"MESHNODE_NETWORK__ANNOUNCE": "/dns4/bootstrap/tcp/4331, /ip6/2001:db8::7/tcp/4331"}
    config = load_config(tmp_path, environ)
    assert config.network.announce == ("/dns4/bootstrap/tcp/4331", "/ip6/2001:db8::7/tcp/4331")
    assert load_config(tmp_path, {}).network.announce == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/dns4/bootstrap/tcp/0", "1 to 65535"),
        ("/ip4/bootstrap/tcp/4331", "no IPv4 address"),
        ("/ip6/192.0.2.7/tcp/4331", "no IPv6 address"),
        ("bootstrap:4331", "/dns4/node.example/tcp/4331"),
        ("/dns4/bootstrap/tcp/4331/p2p/12D3KooW", "/dns4/node.example/tcp/4331"),
    ],
)
def test_what_can_not_be_dialled_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path, {"MESHNODE_NETWORK__ANNOUNCE": text})


def test_a_ticket_of_a_node_at_rest_names_them(tmp_path: Path) -> None:
    init_network(tmp_path, "home")
    config = load_config(tmp_path, {"MESHNODE_NETWORK__ANNOUNCE": "/dns4/bootstrap/tcp/4331"})
    assert addresses(config, tmp_path) == [f"/dns4/bootstrap/tcp/4331/p2p/{own_peer(tmp_path)}"]


@pytest.mark.net
async def test_a_host_tells_them_and_listens_where_it_did() -> None:
    host = Libp2pHost(bytes(range(32)), [LOOPBACK], announce=["/dns4/localhost/tcp/4331"])
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            assert host.addresses == (f"/dns4/localhost/tcp/4331/p2p/{host.peer_id}",)
            nursery.cancel_scope.cancel()


@pytest.mark.net
async def test_a_name_is_dialled() -> None:
    server, client = open_host(bytes(32)), open_host(bytes(range(32)))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            await nursery.start(client.run)
            port = parse_address(server.addresses[0]).port
            await client.connect(server.peer_id, [owned(f"/dns4/localhost/tcp/{port}", server.peer_id)])
            assert server.peer_id in client.peers
            nursery.cancel_scope.cancel()
