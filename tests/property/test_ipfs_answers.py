"""Whatever a daemon or a gateway answers, there is a result that was asked for or an error that was promised.

First what a proper server may put into a proper answer; then heads, lengths and bodies that none should send.
"""

from __future__ import annotations

import json
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshnode.core.errors import ContentUnavailable
from meshnode.core.health import Health
from meshnode.ipfs.gateway import Gateway
from meshnode.ipfs.http import HttpTrouble, ask, http_client
from meshnode.ipfs.rpc import MAX_JSON_BYTES, DaemonRefused, IpfsApi
from meshnode.ipfs.source_order import Fallback
from protocols.bitswap.messages import MAX_BLOCK_BYTES
from protocols.car.messages import Block, Header, encode_block, encode_header
from protocols.ids import DAG_CBOR, RAW, cid_of
from tests.hostile import mutated
from tests.http_server import Site, site
from tests.trees import blocks_of, tree_of

BLOCK = b"the block"
CID = cid_of(RAW, BLOCK)
FILE = bytes(range(100)) * 3
FILE_TREE, FILE_BLOCKS = tree_of(FILE, chunk=50), blocks_of(FILE, chunk=50)
FILE_CAR = encode_header(Header((FILE_TREE.inner[-1][0],))) + b"".join(
    encode_block(Block(cid, FILE_BLOCKS[cid])) for cid in (FILE_TREE.inner[-1][0], *dict.fromkeys(FILE_TREE.leaves))
)
NODE = b"\xa0"
NODE_CID = cid_of(DAG_CBOR, NODE)

words = st.sampled_from(["Version", "ID", "Hash", "Pins", "Message", "0.22.0", CID, "z" + "1" * 20, ""]) | st.text(
    max_size=20
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=8,
)
bodies = st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()) | st.just(BLOCK)
statuses = st.sampled_from([200, 204, 206, 301, 400, 404, 418, 500, 503, 599])


@pytest.fixture(scope="module")
def server() -> Iterator[Site]:
    with site(lambda request: request.reply()) as here:
        yield here


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies, status=statuses)
def test_a_daemon_may_say_anything(server: Site, tmp_path: Path, body: bytes, status: int) -> None:
    source = tmp_path / "file"
    source.write_bytes(BLOCK)
    server.scene = lambda request: request.reply(
        b'{"Version":"0.22.0"}' if "/version" in request.path else body,
        200 if "/version" in request.path else status,
        Connection="close",
    )

    async def ask() -> None:
        health = Health()
        api = IpfsApi(server.multiaddr, health, block_s=5, call_s=5)
        for call in (
            api.identity,
            lambda: api.add(source),
            lambda: api.put(NODE, NODE_CID),
            lambda: api.pinned(CID),
            lambda: api.pin(CID, seconds=5),
            lambda: api.unpin(CID),
        ):
            try:
                result = await call()
            except (ContentUnavailable, DaemonRefused) as error:
                assert str(error).isprintable()
            else:
                assert result is None or isinstance(result, (str, tuple, bool))
        try:
            assert await Fallback([api]).block(CID) == BLOCK
        except ContentUnavailable:
            assert (status, body) != (200, BLOCK)
        for shown in health.current():
            assert shown.code == "ipfs-daemon"

    trio.run(ask)


@settings(max_examples=40)
@given(body=bodies)
def test_a_version_may_be_anything(server: Site, body: bytes) -> None:
    server.scene = lambda request: request.reply(body, Connection="close")

    async def ask() -> None:
        health = Health()
        api = IpfsApi(server.multiaddr, health, call_s=5)
        assert await api.check() is (not health.current())

    trio.run(ask)


@settings(max_examples=60)
@given(
    data=st.data(), kind=st.sampled_from(["", "text/html", "application/vnd.ipld.car", "application/vnd.ipld.car;x"])
)
def test_a_file_in_one_go_may_be_anything(server: Site, data: st.DataObject, kind: str) -> None:
    """From a gateway and from a daemon: only its own blocks come out, and promised errors."""
    at = data.draw(st.integers(0, len(FILE_CAR)))
    noise = data.draw(st.binary(max_size=60) | st.just(FILE_CAR))
    body = data.draw(st.sampled_from([FILE_CAR[:at] + noise, FILE_CAR[:at] + noise + FILE_CAR[at:], FILE_CAR]))
    status = data.draw(statuses | st.just(200))
    server.scene = lambda request: request.reply(
        b'{"Version":"0.22.0"}' if "/version" in request.path else body,
        200 if "/version" in request.path else status,
        Content_Type=kind,
        Connection="close",
    )

    async def ask() -> None:
        for source in (
            Gateway(server.url, Health(), seconds=5),
            IpfsApi(server.multiaddr, Health(), block_s=5),
        ):
            taken = []

            async def take(cid: bytes, block: bytes, taken: list[bytes] = taken) -> None:
                assert block == FILE_BLOCKS[cid]
                taken.append(cid)

            try:
                await Fallback([source]).tree(FILE_TREE.root, len(FILE), take)
            except ContentUnavailable:
                assert (status, body, kind) != (200, FILE_CAR, "application/vnd.ipld.car")
            else:
                assert sorted(taken) == sorted(FILE_BLOCKS)

    trio.run(ask)


@settings(max_examples=60)
@given(
    body=bodies,
    status=statuses,
    location=st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=60),
)
def test_a_gateway_may_say_anything(server: Site, body: bytes, status: int, location: str) -> None:
    server.scene = lambda request: request.reply(body, status, Location=location, Connection="close")

    async def ask() -> None:
        try:
            assert await Fallback([Gateway(server.url, Health(), seconds=5)]).block(CID) == BLOCK
        except ContentUnavailable:
            assert (status, body) != (200, BLOCK)

    trio.run(ask)


MIB = 1 << 20
BLOCK = b"the block"
CID = cid_of(RAW, BLOCK)
SECONDS = 0.4  # given to an answer that never ends


class Wire:
    """A TCP server that reads the head of a request and sends whatever it was told to."""

    def __init__(self) -> None:
        self.pieces: Callable[[], Iterable[bytes]] = tuple  # for every request anew
        self.has_version = False  # a daemon that says who it is, and is hostile then
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=50)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            head = b""
            while b"\r\n\r\n" not in head:
                piece = connection.recv(4096)
                if not piece:
                    return
                head += piece
            version = self.has_version and b"/api/v0/version" in head
            for piece in [ok(b'{"Version":"0.22.0"}')] if version else self.pieces():
                connection.sendall(piece)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    server = Wire()
    yield server
    server.close()


def ok(body: bytes, *lines: bytes) -> bytes:
    head = b"\r\n".join((b"HTTP/1.1 200 OK", *(lines or (b"Content-Length: %d" % len(body),)), b"", b""))
    return head + body


ENDED = {
    "nothing": [b""],
    "a line without an end": [b"HTTP/1.1 200" + b" OK" * 50_000],
    "HTTP/0.9": [BLOCK],
    "HTTP/2": [b"HTTP/2 200\r\n\r\n"],
    "no status": [b"HTTP/1.1\r\n\r\n"],
    "a status of four digits": [b"HTTP/1.1 9999 OK\r\n\r\n"],
    "a status of 0": [b"HTTP/1.1 000 OK\r\nContent-Length: 0\r\n\r\n"],
    "switching protocols": [b"HTTP/1.1 101 X\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n" + bytes(100)],
    "100,000 header lines": [b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 100_000 + b"\r\n"],
    "a header line of 1 MiB": [b"HTTP/1.1 200 OK\r\nX-A: " + b"b" * MIB + b"\r\n\r\n"],
    "a header that is no text": [b"HTTP/1.1 200 OK\r\n\x00\xff: \x80\r\n\r\n"],
    "a folded header": [b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n c\r\nContent-Length: 1\r\n\r\nx"],
    "a negative length": [ok(BLOCK, b"Content-Length: -9")],
    "a length of 2^64": [ok(BLOCK, b"Content-Length: 18446744073709551616")],
    "a length of 10,000 digits": [ok(BLOCK, b"Content-Length: " + b"9" * 10_000)],
    "a length in hex": [ok(BLOCK, b"Content-Length: 0x9")],
    "two lengths": [ok(BLOCK, b"Content-Length: 9", b"Content-Length: 5")],
    "a length and chunks": [ok(b"5\r\nwrong\r\n0\r\n\r\n", b"Content-Length: 9", b"Transfer-Encoding: chunked")],
    "a longer length than what comes": [ok(BLOCK, b"Content-Length: 1000")],
    "an encoding of transfers that nobody knows": [ok(BLOCK, b"Transfer-Encoding: gzip, chunked")],
    "a chunk of 2^64 bytes": [ok(b"ffffffffffffffff\r\n" + BLOCK, b"Transfer-Encoding: chunked")],
    "a chunk of many digits": [ok(b"0" * 5000 + b"9\r\n" + BLOCK, b"Transfer-Encoding: chunked")],
    "a negative chunk": [ok(b"-9\r\n" + BLOCK, b"Transfer-Encoding: chunked")],
    "a chunk extension of 1 MiB": [ok(b"9;" + b"a" * MIB, b"Transfer-Encoding: chunked")],
    "trailers of 1 MiB": [ok(b"1\r\nx\r\n0\r\n" + b"A: b\r\n" * 170_000, b"Transfer-Encoding: chunked")],
    "chunks that end early": [ok(b"100\r\nshort", b"Transfer-Encoding: chunked")],
    "a redirect to nothing": [b"HTTP/1.1 302 X\r\nContent-Length: 0\r\n\r\n"],
    "a redirect far away": [b"HTTP/1.1 302 X\r\nContent-Length: 0\r\nLocation: /" + b"a" * 70_000 + b"\r\n\r\n"],
    "a redirect to no address": [b"HTTP/1.1 302 X\r\nLocation: http://[::1\r\nContent-Length: 0\r\n\r\n"],
    "a redirect to another scheme": [b"HTTP/1.1 302 X\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"],
    "a redirect to a bad port": [b"HTTP/1.1 302 X\r\nLocation: http://a:99999/\r\nContent-Length: 0\r\n\r\n"],
    "a redirect to itself": [b"HTTP/1.1 302 X\r\nLocation: \r\nContent-Length: 0\r\n\r\n"],
    "more than a block": [ok(bytes(MAX_BLOCK_BYTES + 1))],
    "another block": [ok(BLOCK + b"!")],
}  # fmt: skip
ENDLESS: dict[str, Callable[[], Iterable[bytes]]] = {
    "headers without end": lambda: (b"HTTP/1.1 200 OK\r\n", *repeat(b"X-A: b\r\n" * 8000, 200)),
    "early hints without end": lambda: repeat(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 500),
    "continue without end": lambda: repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 500),
    "bytes without end": lambda: iter([ok(b"", b"Connection: close"), *repeat(bytes(1 << 16), 20_000)]),
    "chunks of one byte": lambda: iter([ok(b"", b"Transfer-Encoding: chunked"), *repeat(b"1\r\nx\r\n" * 2000, 9000)]),
    "a chunk that drips": lambda: _drip(ok(b"", b"Transfer-Encoding: chunked") + b"ffff\r\n"),
    "a head that drips": lambda: _drip(b"HTTP/1.1 200 OK\r\nX-A: "),
    "a head and nothing more": lambda: _drip(ok(b"", b"Content-Length: 100"), b""),
}


def _drip(before: bytes, drop: bytes = b"x") -> Iterator[bytes]:
    yield before
    stop = threading.Event()
    for _ in range(100):
        stop.wait(0.05)
        yield drop


@contextmanager
def bounded(limit: int) -> Iterator[None]:
    """No more than `limit` bytes are allocated at once in the block."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit


async def fetch(wire: Wire, seconds: float) -> None:
    """Ask for the block from the daemon and from the gateway; it must not come, and the reason must be a text."""
    health = Health()
    api = IpfsApi(f"/ip4/127.0.0.1/tcp/{wire.port}", health, block_s=seconds, call_s=seconds, margin_s=0)
    for source in (Gateway(f"http://127.0.0.1:{wire.port}", health, seconds=seconds), api):
        with trio.fail_after(30), pytest.raises(ContentUnavailable) as caught:
            await Fallback([source]).block(CID)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def told(wire: Wire, what: str) -> float:
    """Let the server answer so; the seconds that it is given."""
    wire.pieces = ENDLESS.get(what, lambda: ENDED[what])
    return 5.0 if what in ENDED else SECONDS


@pytest.mark.parametrize("what", [*ENDED, *ENDLESS])
async def test_an_answer_that_no_server_should_send(wire: Wire, what: str) -> None:
    with bounded(24 * MIB):
        await fetch(wire, told(wire, what))


@pytest.mark.parametrize("what", [*ENDED, *ENDLESS])
async def test_what_a_daemon_sends_in_place_of_a_block(
    wire: Wire, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounded in memory and in time, all of it; no thread and no connection stays behind."""
    monkeypatch.setattr(wire, "has_version", True)
    seconds = told(wire, what)
    api = IpfsApi(f"/ip4/127.0.0.1/tcp/{wire.port}", Health(), block_s=seconds, call_s=seconds, margin_s=0)

    async def refuse(_cid: bytes, _block: bytes) -> None:
        raise AssertionError("there is no block to take")

    with bounded(24 * MIB):
        assert await api.version()
        with trio.fail_after(seconds + 2):
            try:
                assert await Fallback([api]).block(CID) == BLOCK, "a wrong head may be overlooked"
            except ContentUnavailable as error:
                assert str(error).isprintable() and len(str(error)) < 1000
        with trio.fail_after(2 * seconds + 2), pytest.raises(ContentUnavailable) as caught:
            await api.tree(CID, len(BLOCK), refuse)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    await no_threads(api)


async def no_threads(api: IpfsApi) -> None:
    """Wait until every thread of its calls has ended."""
    with trio.fail_after(5):
        while api._client._threads.borrowed_tokens:  # noqa: ASYNC110 - a thread that was abandoned tells nobody
            await trio.sleep(0.02)


async def test_an_upload_that_nobody_takes_can_be_given_up(
    wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "has_version", True)
    wire.pieces = lambda: _drip(b"", b"")
    (tmp_path / "file").write_bytes(bytes(32 * MIB))
    api = IpfsApi(f"/ip4/127.0.0.1/tcp/{wire.port}", Health())
    assert await api.version()
    with bounded(24 * MIB):
        with trio.move_on_after(SECONDS) as limit:
            await api.add(tmp_path / "file")
        assert limit.cancelled_caught
        await no_threads(api)


@given(mutated(st.sampled_from([ok(BLOCK), ok(b"9\r\nthe block\r\n0\r\n\r\n", b"Transfer-Encoding: chunked")])))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_injured_answers(wire: Wire, data: bytes) -> None:
    wire.pieces = lambda: [data]

    async def get() -> None:
        async with http_client() as client:
            with trio.fail_after(30):
                try:
                    reply = await ask(
                        client, "GET", f"http://127.0.0.1:{wire.port}/", limit_bytes=1000, seconds=5, redirects=1
                    )
                except HttpTrouble as error:
                    assert len(str(error)) < 1000
                else:
                    assert len(reply.body) <= 1000 and 100 <= reply.status <= 999

    trio.run(get)


NESTED = 10_000
JSON = {
    "lists in lists": b"[" * NESTED + b"]" * NESTED,
    "lists that never close": b"[" * 60_000,
    "objects in objects": b'{"Version":' * NESTED + b"1" + b"}" * NESTED,
    "a deep value": b'{"Version":' + b"[" * NESTED + b"]" * NESTED + b"}",
    "a string of 60 KiB": b'{"Version":"' + b"0" * 60_000 + b'"}',
    "a number of 60 KiB": b'{"Version":' + b"9" * 60_000 + b"}",
    "an exponent": b'{"Version":1e999999999}',
    "NaN": b'{"Version":NaN}',
    "minus infinity": b"-Infinity",
    "10,000 keys": json.dumps({f"k{number}": 1 for number in range(5000)}).encode(),
    "one key 5,000 times": b"{" + b'"Version":1,' * 5000 + b'"Version":{}}',
    "a lone surrogate": b'{"Version":"\\ud800"}',
    "control characters": b'{"Version":"0.22.0\\u0000\\u001b[2J"}',
    "UTF-16": '{"Version":"zero"}'.encode("utf-16"),
    "UTF-32": '{"Version":"zero"}'.encode("utf-32-be"),
    "half a UTF-16": '{"Version":"0.22.0"}'.encode("utf-16-le")[:-1],
    "a byte order mark": b"\xef\xbb\xbf" + b'{"Version":1}',
    "latin 1": b'{"Version":"\xe9"}',
    "two values": b'{"Version":"0.22.0"}{"Version":"0.22.0"}',
    "full-width digits": '{"Version":"０.２２.０"}'.encode(),
    "a list of versions": b'{"Version":["0.22.0"]}',
    "more than the limit": b'{"Version":"0.22.0"}' + b" " * MAX_JSON_BYTES,
}


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("what", JSON)
async def test_json_that_no_daemon_should_send(wire: Wire, what: str, status: int) -> None:
    body = JSON[what]
    head = b"HTTP/1.1 %d X\r\nContent-Type: application/json; charset=ebcdic\r\n" % status
    wire.pieces = lambda: [head + b"Content-Length: %d\r\n\r\n" % len(body) + body]
    health = Health()
    api = IpfsApi(f"/ip4/127.0.0.1/tcp/{wire.port}", health, call_s=5)
    with bounded(8 * MIB), trio.fail_after(30), pytest.raises((ContentUnavailable, DaemonRefused)) as caught:
        await api.version()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert [shown.code for shown in health.current()] == ["ipfs-daemon"]
