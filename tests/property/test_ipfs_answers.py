"""Whatever a daemon or a gateway answers, there is a result that was asked for or an error that was promised."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshnode.core.errors import ContentUnavailable
from meshnode.core.health import Health
from meshnode.ipfs.fallback import Fallback
from meshnode.ipfs.gateway import Gateway
from meshnode.ipfs.rpc import DaemonRefused, IpfsApi
from protocols.car.messages import Block, Header, encode_block, encode_header
from protocols.ids import DAG_CBOR, RAW, cid_of
from protocols.unixfs.builder import Builder
from tests.http_server import Site, site

BLOCK = b"the block"
CID = cid_of(RAW, BLOCK)
FILE = bytes(range(100)) * 3
_builder = Builder(chunk=50)
_builder.update(FILE)
FILE_TREE = _builder.finish()
FILE_BLOCKS = {
    **dict(FILE_TREE.inner),
    **{cid: FILE[50 * at : 50 * at + 50] for at, cid in enumerate(FILE_TREE.leaves)},
}
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


@settings(max_examples=40, deadline=None)
@given(body=bodies)
def test_a_version_may_be_anything(server: Site, body: bytes) -> None:
    server.scene = lambda request: request.reply(body, Connection="close")

    async def ask() -> None:
        health = Health()
        api = IpfsApi(server.multiaddr, health, call_s=5)
        assert await api.check() is (not health.current())

    trio.run(ask)


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=60, deadline=None)
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
