"""What the first bytes of a connection say."""

from __future__ import annotations

import ssl
from typing import Any

import pytest
import trio

from meshnode.net.libp2p import listener as listening
from meshnode.net.libp2p.listener import Listener, begins_tls

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


async def test_calls_of_one_address_beyond_the_burst_are_taken_at_the_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    per_s, burst, more = 50.0, 5, 10
    monkeypatch.setattr(listening, "CALLS_PER_S", per_s)
    monkeypatch.setattr(listening, "CALL_BURST", float(burst))
    taken: list[float] = []
    all_taken = trio.Event()

    async def take(stream: trio.SocketStream, first: bytes) -> None:
        taken.append(trio.current_time())
        if len(taken) == burst + more:
            all_taken.set()
        await stream.aclose()

    no_lanes: Any = None
    listener = Listener(["/ip4/127.0.0.1/tcp/0"], take, no_lanes)
    await listener.open()
    ((host, port),) = listener.bound
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.run)
        began = trio.current_time()
        for _ in range(burst + more):
            call = await trio.open_tcp_stream(host, port)
            await call.send_all(MULTISTREAM)
        with trio.fail_after(60):
            await all_taken.wait()
        nursery.cancel_scope.cancel()
    await listener.aclose()
    late = [at - began for at in taken]
    assert all(late[burst + n] >= 0.9 * (n + 1) / per_s for n in range(more)), late
