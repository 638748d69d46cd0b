"""What the first bytes of a connection say."""

from __future__ import annotations

import ssl

import pytest

from meshnode.net.libp2p.listener import begins_tls

MULTISTREAM = b"\x13/multistream/1.0.0\n"


def client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


def test_the_two_kinds_are_told_apart_and_in_pieces_too() -> None:
    hello = client_hello()
    assert begins_tls(hello) is True
    assert [begins_tls(hello[:size]) for size in range(6)] == [None] * 6
    assert begins_tls(hello[:6]) is True
    assert begins_tls(MULTISTREAM) is False
    assert begins_tls(MULTISTREAM[:1]) is False


@pytest.mark.parametrize(
    "first", [b"\x16\x04", b"\x16\x03\x02", b"\x16\x03\x01\x00\x05\x02", b"GET / HTTP/1.1", b"\0"]
)
def test_what_is_no_client_hello(first: bytes) -> None:
    assert begins_tls(first) is False
