"""DHT messages on the wire: vectors, framing, what is skipped and refused. The oracle is protobuf's runtime."""

from __future__ import annotations

import ipaddress

import pytest
from multiaddr import Multiaddr

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import DAG_PB, RAW, PeerId, base58_encode, cid_of, cid_to_bytes
from protocols.kad.address import address_bytes, address_of, peer_bytes, peer_of
from protocols.kad.messages import (
    MAX_ADDRESSES,
    MAX_KEY_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_PEERS,
    Kind,
    Message,
    MessageReader,
    Peer,
    block_key,
    decode,
    encode,
    place,
)
from protocols.kad.network import AMINO, LAN, LAN_HERE, DhtNetwork, network_of
from protocols.protobuf import put_field
from tests.protobuf_oracle import oracle
from tests.unit.membership_actors import peer_of_key
from tests.vectors import Case, hold

ONE, OTHER = peer_of_key("one"), peer_of_key("other")
OLD = PeerId(base58_encode(b"\x12\x20" + bytes(range(32))))  # of an RSA key: QmNL...
KEY = b"\x12\x20" + bytes(32)
FORMS = (
    "/ip4/192.0.2.1/tcp/4331",
    "/ip6/2001:db8::7/tcp/1",
    "/dns/node.example/tcp/65535",
    "/dns4/a/tcp/80",
    "/dns6/node.example/tcp/443",
)

ACCEPTED = {
    "find node": Message(kind=Kind.FIND_NODE, key=peer_bytes(ONE)),
    "nearer peers": Message(kind=Kind.FIND_NODE, closer=(Peer(ONE, FORMS), Peer(OLD, FORMS[:1]), Peer(OTHER, ()))),
    "get providers": Message(kind=Kind.GET_PROVIDERS, key=KEY),
    "providers": Message(
        kind=Kind.GET_PROVIDERS, key=KEY, closer=(Peer(ONE, FORMS[:1]),), providers=(Peer(OTHER, FORMS[1:2]),)
    ),
    "add provider": Message(kind=Kind.ADD_PROVIDER, key=KEY, providers=(Peer(ONE, FORMS[:2]),)),
    "ping": Message(kind=Kind.PING),
    "get value": Message(kind=Kind.GET_VALUE, key=b"/ipns/" + bytes(34)),
    "put value": Message(kind=Kind.PUT_VALUE, key=b"/pk/" + bytes(34)),
    "longest key": Message(kind=Kind.GET_PROVIDERS, key=bytes(MAX_KEY_BYTES)),
}


def raw_peer(peer: PeerId, *addresses: bytes) -> bytes:
    return put_field(1, peer_bytes(peer)) + b"".join(put_field(2, address) for address in addresses)


GOOD = address_bytes(FORMS[0])
SKIPPED = {
    "a value": (b"\x08\x01\x1a\x05hello", Message(kind=Kind.GET_VALUE)),
    "unknown fields": (b"\x08\x05\x50\x03\x7a\x01a", Message(kind=Kind.PING)),
    "no kind is a put": (b"", Message(kind=Kind.PUT_VALUE)),
    "a peer without id": (b"\x08\x04\x42\x00", Message(kind=Kind.FIND_NODE)),
    "a peer with a short id": (b"\x08\x04" + put_field(8, b"\x0a\x02\x12\x20"), Message(kind=Kind.FIND_NODE)),
    "a peer twice": (
        b"\x08\x04" + put_field(8, raw_peer(ONE, GOOD)) + put_field(8, raw_peer(ONE)),
        Message(kind=Kind.FIND_NODE, closer=(Peer(ONE, FORMS[:1]),)),
    ),
    "addresses that we can't dial": (
        b"\x08\x04"
        + put_field(
            8,
            raw_peer(
                ONE,
                b"",
                b"\x04\x7f\x00\x00\x01",  # no port
                b"\x04\x7f\x00\x00\x01\x91\x02\x00\x01",  # UDP
                b"\x04\x7f\x00\x00\x01\x06\x00\x00",  # port 0
                b"\x04\x7f\x00\x00\x01\x06\x00",  # cut off
                GOOD + b"\xdd\x03",  # a WebSocket
                GOOD + b"\xa5\x03\x26" + peer_bytes(OTHER),  # another peer's
                b"\x35\x03a/b\x06\x00\x01",  # no host name
                b"\x35\x02\xff\xfe\x06\x00\x01",
                b"\x35\x80",
                GOOD + b"\xa5\x03\x26" + peer_bytes(ONE),
            ),
        )
        + b"",
        Message(kind=Kind.FIND_NODE, closer=(Peer(ONE, FORMS[:1]),)),
    ),
}
REFUSED = {
    "cut varint": b"\x08\x80",
    "unknown kind": b"\x08\x06",
    "kind of 64 bits": b"\x08" + b"\xff" * 9 + b"\x01",
    "kind is bytes": b"\x0a\x01\x04",
    "key is a varint": b"\x10\x01",
    "key of 81 bytes": b"\x12\x51" + bytes(81),
    "length leads outside": b"\x42\x05\x0a",
    "peer is a varint": b"\x40\x01",
    "provider is cut off": b"\x4a\x02\x0a\x05",
    "record is a varint": b"\x18\x01",
    "group": b"\x0b\x0c",
}


def test_vectors() -> None:
    cases = [Case(name, encode(message), message) for name, message in ACCEPTED.items()]
    cases += [Case(f"skipped: {name}", data, message) for name, (data, message) in SKIPPED.items()]
    cases += [Case(name, data) for name, data in REFUSED.items()]
    hold("kad", cases, decode)


PUBLISHED = {
    "Peer": {"id": (1, "bytes"), "addrs": (2, "*bytes"), "connection": (3, "int32")},
    "Message": {
        "type": (1, "int32"),
        "key": (2, "bytes"),
        "closerPeers": (8, "*Peer"),
        "providerPeers": (9, "*Peer"),
    },
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_protobuf_runtime_reads_the_same(name: str) -> None:
    ours = ACCEPTED[name]
    theirs = oracle("kad", PUBLISHED)()
    theirs.ParseFromString(encode(ours))
    assert (theirs.type, theirs.key) == (ours.kind, ours.key)
    for mine, said in ((ours.closer, theirs.closerPeers), (ours.providers, theirs.providerPeers)):
        assert [peer.id for peer in said] == [peer_bytes(peer.id) for peer in mine]
        assert [[str(Multiaddr(a)) for a in peer.addrs] for peer in said] == [list(peer.addresses) for peer in mine]
        for peer in said:
            peer.connection = 2
    assert decode(theirs.SerializeToString()) == ours


@pytest.mark.parametrize("text", FORMS)
def test_addresses_are_those_of_the_multiaddr_package(text: str) -> None:
    assert address_bytes(text) == Multiaddr(text).to_bytes()
    assert address_bytes(f"{text}/p2p/{ONE}") == Multiaddr(text).to_bytes()
    assert address_of(Multiaddr(text).to_bytes(), ONE) == text
    assert address_of(Multiaddr(f"{text}/p2p/{ONE}").to_bytes(), ONE) == text
    assert address_of(Multiaddr(f"{text}/p2p/{OTHER}").to_bytes(), ONE) is None


def test_addresses_that_have_no_place_in_a_message() -> None:
    for text in (
        "",
        "/ip4/1.2.3.4",
        "/ip4/1.2.3.4/udp/1",
        "/ip4/::1/tcp/1",
        "/unix/a/tcp/1",
        "/ip4/1.2.3.4/tcp/70000",
    ):
        with pytest.raises(LocalProtocolError):
            address_bytes(text)


def test_peer_ids() -> None:
    for peer in (ONE, OLD):
        assert peer_of(peer_bytes(peer)) == peer
    for data in (
        b"",
        b"\x00",
        b"\x00\x00",
        b"\x12\x20" + bytes(31),
        b"\x00\x24" + bytes(35),
        b"\x00\x2b" + bytes(43),
    ):
        assert peer_of(data) is None
    with pytest.raises(RemoteProtocolError):
        peer_bytes(PeerId("12D3"))


def test_long_lists_are_cut() -> None:
    ports = [address_bytes(f"/ip4/192.0.2.1/tcp/{port}") for port in range(1, 41)]
    crowd = b"".join(put_field(9, raw_peer(peer_of_key(str(n)), *ports)) for n in range(MAX_PEERS + 5))
    message = decode(b"\x08\x03" + crowd)
    assert len(message.providers) == MAX_PEERS
    assert {len(peer.addresses) for peer in message.providers} == {MAX_ADDRESSES}
    with pytest.raises(RemoteProtocolError):
        decode(bytes(MAX_MESSAGE_BYTES + 1))


def test_our_own_limits() -> None:
    peer = Peer(ONE, tuple(f"/ip4/192.0.2.1/tcp/{port}" for port in range(1, MAX_ADDRESSES + 2)))
    for message in (
        Message(kind=Kind.PING, key=bytes(MAX_KEY_BYTES + 1)),
        Message(kind=Kind.FIND_NODE, closer=(Peer(ONE),) * (MAX_PEERS + 1)),
        Message(kind=Kind.FIND_NODE, closer=(peer,)),
    ):
        with pytest.raises(LocalProtocolError):
            encode(message)


@pytest.mark.parametrize(
    "length", [b"\x81\x80\x10", b"\xff\xff\xff\xff\x7f", b"\x80\x80\x80\x80", b"\x00", b"\x00" * 1000]
)
def test_an_impossible_length_is_refused_at_once(length: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=r"length|possible"):
        list(MessageReader().feed(length))


def test_a_block_has_one_key_whatever_its_codec() -> None:
    data = b"hello"
    assert block_key(cid_to_bytes(cid_of(RAW, data))) == block_key(cid_to_bytes(cid_of(DAG_PB, data)))
    assert place(b"hello") == int("2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", 16)


TAKEN = {
    AMINO: "8.8.8.8 2606:4700::1111",
    LAN: "8.8.8.8 192.168.1.4 100.64.3.1 fd00::1",
    LAN_HERE: "127.0.0.1 ::1",
}
NOT_TAKEN = {
    AMINO: "192.168.1.4 100.64.3.1 127.0.0.1 fd00::1 ::1 fe80::1 "
    "::ffff:127.0.0.1 ::ffff:192.168.1.4 64:ff9b::7f00:1 2002:c0a8:0101::1",  # what hides an address of IPv4
    LAN: "127.0.0.1 255.255.255.255",
    LAN_HERE: "0.0.0.0 224.0.0.1",
}


@pytest.mark.parametrize("network", TAKEN, ids=["amino", "lan", "lan here"])
def test_networks(network: DhtNetwork) -> None:
    for hosts, taken in ((TAKEN, True), (NOT_TAKEN, False)):
        for host in hosts[network].split():
            kind = f"ip{ipaddress.ip_address(host).version}"
            assert network.takes(f"/{kind}/{host}/tcp/4001") is taken, host


def test_names_are_not_dialled_on_a_strangers_word() -> None:
    assert not any(network.takes("/dns4/localhost/tcp/1") for network in (AMINO, LAN, LAN_HERE))


def test_the_network_of_an_address() -> None:
    assert network_of("/dns4/node.example/tcp/1") is AMINO
    assert network_of(f"/ip4/203.0.113.9/tcp/1/p2p/{ONE}") is AMINO
    assert network_of("/ip4/10.1.2.3/tcp/1") is LAN
    assert network_of("/ip6/::1/tcp/1") is LAN_HERE
