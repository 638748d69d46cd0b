"""Sources outside the mesh over real HTTP: good, slow, corrupt, flooding, broken and absent ones."""

from __future__ import annotations

import json
import socket
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from meshnode.core.errors import ConfigError, ContentUnavailable, ModelError
from meshnode.core.health import Health
from meshnode.core.supervise import Service
from meshnode.ipfs.gateway import Gateway
from meshnode.ipfs.rpc import DaemonRefused, IpfsApi
from meshnode.ipfs.source_order import Fallback, Source, SourceFailed, WrongBlock, verified
from protocols.bitswap.messages import MAX_BLOCK_BYTES
from protocols.ids import RAW, base58_encode, cid_of, cid_to_bytes
from protocols.unixfs.builder import file_cid
from tests.http_server import Request, Scene, Site, drip, flood, no_http, packed, silence, site, truncate
from tests.unit.membership_actors import peer_of_key

BLOCK = b"what the mesh wants" * 1000
CID = cid_of(RAW, BLOCK)
DAEMON, OTHER = peer_of_key("daemon"), peer_of_key("other")
SHORT = 0.3  # seconds; what a request may take where the answer never comes


def good(request: Request) -> None:
    request.reply(BLOCK)


def wrong(request: Request) -> None:
    request.reply(b"something else")


def status(code: int, body: bytes = b"<html>no</html>") -> Scene:
    return lambda request: request.reply(body, code)


BROKEN: dict[str, tuple[Scene, str]] = {
    "silent": (silence, "within 0.3 s"),
    "dripping": (drip, "within 0.3 s"),
    "flooding": (flood, "more than"),
    "truncated": (truncate, "broke off"),
    "no HTTP": (no_http, "no HTTP"),
    "compressed": (packed, "gzip"),
    "HTTP 500": (status(500), "HTTP 500"),
}


def patience(reason: str) -> float:
    """Seconds for an answer: short where none is to come, else enough for a busy machine."""
    return SHORT if "within" in reason else 5.0


def dead_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def running(*services: Service) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for service in services:
            await nursery.start(service.run)
        yield
        nursery.cancel_scope.cancel()


def texts(health: Health, code: str) -> list[str]:
    return [shown.text for shown in health.current() if shown.code == code]


# ---------------------------------------------------------------- gateways


@asynccontextmanager
async def gateway_of(scene: Scene, seconds: float = 5.0) -> AsyncIterator[tuple[Gateway, Site, Health]]:
    """A running gateway's client, and who plays the scene."""
    health = Health()
    with site(scene) as here:
        gateway = Gateway(f"{here.url}/", health, seconds=seconds)
        async with running(gateway):
            yield gateway, here, health


async def test_a_gateway_is_asked_for_the_raw_block() -> None:
    async with gateway_of(good) as (gateway, here, _):
        assert await gateway.block(CID) == BLOCK
        assert here.paths == [f"/ipfs/{CID}?format=raw"]


async def test_a_gateway_that_is_not_there() -> None:
    gateway = Gateway(f"http://127.0.0.1:{dead_port()}", Health(), seconds=5)
    async with running(gateway):
        with pytest.raises(SourceFailed, match="can't be reached"):
            await gateway.block(CID)


@pytest.mark.parametrize("scene", BROKEN)
async def test_a_broken_gateway_fails_in_time_and_the_health_names_it_until_it_answers(scene: str) -> None:
    answer, reason = BROKEN[scene]
    async with gateway_of(answer, patience(reason)) as (gateway, here, health):
        for then in (good, status(404)):
            here.scene = answer
            with trio.fail_after(30), pytest.raises(SourceFailed, match=reason):
                await gateway.block(CID)
            with trio.fail_after(30), pytest.raises(ContentUnavailable):
                await gateway.tree(CID, len(BLOCK), refuse)
            assert health.current() == []  # it may be a hiccup
            (shown,) = health.current(1e12)
            assert shown.code == "gateway-unusable" and "content.gateways" in shown.text
            assert here.url in shown.text
            here.scene = then
            gateway._seconds = 5.0
            with suppress(ContentUnavailable):
                await gateway.block(CID)
            assert health.current(1e12) == []
            gateway._seconds = patience(reason)
        gateway.sent_bad_data(CID)
        assert [shown.code for shown in health.current(1e12)] == ["bad-gateway"]


async def refuse(cid: bytes, block: bytes) -> None:
    raise AssertionError("there is no block to take")


async def test_a_flood_takes_no_memory() -> None:
    async with gateway_of(flood) as (gateway, _, _):
        tracemalloc.start()
        try:
            with pytest.raises(SourceFailed, match="more than"):
                await gateway.block(CID)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 4 * MAX_BLOCK_BYTES


@pytest.mark.parametrize("code", [404, 410, 504])
async def test_a_gateway_without_the_block_is_well(code: int) -> None:
    async with gateway_of(status(code)) as (gateway, _, _):
        with pytest.raises(ContentUnavailable) as caught:
            await gateway.block(CID)
        assert not isinstance(caught.value, SourceFailed)


async def test_redirects_are_followed_within_the_scheme_alone() -> None:
    with site(good) as target:
        elsewhere = f"{target.url}/elsewhere"
        async with gateway_of(lambda r: r.reply(b"", 301, Location=elsewhere)) as (gateway, here, _):
            assert await gateway.block(CID) == BLOCK
            assert target.paths == ["/elsewhere"]
            for place in (
                target.url.replace("http:", "https:"),
                "file:///etc/passwd",
                "ftp://127.0.0.1/",
                "http://[",
            ):
                here.scene = lambda r, place=place: r.reply(b"", 302, Location=place)  # type: ignore[misc]
                with pytest.raises(SourceFailed):
                    await gateway.block(CID)
            here.scene = lambda r: r.reply(b"", 302, Location=here.url)
            with pytest.raises(SourceFailed, match="redirects more than 3 times"):
                await gateway.block(CID)
        assert len(target.paths) == 1


# ---------------------------------------------------------------- several sources


def test_what_is_not_the_block_is_never_accepted() -> None:
    assert verified("a", CID, BLOCK) == BLOCK
    for wrong in (b"", BLOCK[:-1], BLOCK + b"x"):
        with pytest.raises(WrongBlock, match="not the block"):
            verified("a", CID, wrong)
    large = bytes(MAX_BLOCK_BYTES + 1)
    with pytest.raises(WrongBlock):
        verified("a", cid_of(RAW, large), large)


async def test_a_source_with_bad_data_is_dropped_named_and_the_next_one_asked() -> None:
    health = Health()
    with site(wrong) as hostile, site(good) as honest:
        sources = [Gateway(hostile.url, health, seconds=5), Gateway(honest.url, health, seconds=5)]
        outside = Fallback(sources)
        async with running(*sources):
            for _ in range(3):
                assert await outside.block(CID) == BLOCK
        assert len(hostile.paths) == 1
    assert outside.names == (honest.url,)
    assert outside.bytes_from == {honest.url: 3 * len(BLOCK)}
    assert [hostile.url in text for text in texts(health, "bad-gateway")] == [True]


async def test_who_gave_the_last_block_is_asked_first_and_who_failed_rests() -> None:
    with site(status(404)) as empty, site(status(500)) as broken, site(good) as full:
        sources = [Gateway(here.url, Health(), seconds=5) for here in (empty, broken, full)]
        outside = Fallback(sources)
        async with running(*sources):
            assert await outside.block(CID) == BLOCK
            assert outside.names[0] == full.url
            full.scene = status(404)
            with pytest.raises(ContentUnavailable, match=r"does not have it.*failed a moment ago"):
                await outside.block(CID)
        assert [len(here.paths) for here in (empty, broken, full)] == [2, 1, 2]


async def test_nobody_to_ask_is_an_answer() -> None:
    with pytest.raises(ContentUnavailable, match="no source is left"):
        await Fallback([]).block(CID)


# ---------------------------------------------------------------- the daemon


class Daemon:
    """The RPC of a daemon that works; `calls` replaces single answers."""

    def __init__(self) -> None:
        self.calls: dict[str, Scene] = {}

    def __call__(self, request: Request) -> None:
        call = request.path.removeprefix("/api/v0/").partition("?")[0]
        assert request.command == "POST"
        self.calls.get(call, getattr(self, call.replace("/", "_")))(request)

    def version(self, request: Request) -> None:
        request.reply(b'{"Version":"0.22.0","Commit":"","Repo":"14"}')

    def id(self, request: Request) -> None:
        places = [
            f"/ip4/127.0.0.1/tcp/4001/p2p/{DAEMON}",
            f"/ip4/127.0.0.1/udp/4001/quic-v1/p2p/{DAEMON}",
            f"/ip4/192.0.2.1/tcp/4001/p2p/{OTHER}/p2p-circuit/p2p/{DAEMON}",
            f"/ip4/192.0.2.1/tcp/4001/p2p/{OTHER}",
            "/ip4/127.0.0.1/tcp/0",
            7,
        ]
        request.reply(json.dumps({"ID": DAEMON, "Addresses": places}).encode())

    def block_get(self, request: Request) -> None:
        good(request)

    def add(self, request: Request) -> None:
        body = request.body.partition(b"\r\n\r\n")[2]
        cid = file_cid(body[: body.rindex(b"\r\n--")])
        request.reply(b'{"Name":"x","Hash":"%s","Size":"1"}\n' % cid.encode())

    def pin_add(self, request: Request) -> None:
        base58 = "z" + base58_encode(cid_to_bytes(CID))  # as js-ipfs writes it
        request.reply(json.dumps({"Pins": [base58]}).encode())

    def pin_rm(self, request: Request) -> None:
        no(request, "not pinned or pinned indirectly")

    def swarm_connect(self, request: Request) -> None:
        no(request, "failed to dial: connection refused")


def no(request: Request, message: str) -> None:
    """A daemon's refusal."""
    request.reply(json.dumps({"Message": message, "Code": 0, "Type": "error"}).encode(), 500)


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@pytest.fixture
def here(daemon: Daemon) -> Iterator[Site]:
    with site(daemon) as running_site:
        yield running_site


@asynccontextmanager
async def api(address: str, health: Health, seconds: float = 5.0) -> AsyncIterator[IpfsApi]:
    daemon_api = IpfsApi(address, health, block_s=seconds, call_s=seconds, margin_s=0, check_s=3600)
    async with running(daemon_api):
        yield daemon_api


@pytest.fixture
def health() -> Health:
    return Health()


async def test_a_daemon_that_works(here: Site, tmp_path: Path, health: Health) -> None:
    health.set("ipfs-daemon", address="a", reason="It was away.")
    source = tmp_path / "layer.bin"
    source.write_bytes(bytes(range(256)) * 5000)
    async with api(here.multiaddr, health) as daemon_api:
        assert await daemon_api.version() == "0.22.0"
        assert await daemon_api.identity() == (DAEMON, (f"/ip4/127.0.0.1/tcp/4001/p2p/{DAEMON}",))
        assert verified(daemon_api.name, CID, await daemon_api.block(CID)) == BLOCK
        assert await daemon_api.add(source) == file_cid(source.read_bytes())
        await daemon_api.pin(CID)
        await daemon_api.unpin(CID)
        assert health.current() == []
        with pytest.raises(DaemonRefused, match="failed to dial"):
            await daemon_api.connect("/ip4/127.0.0.1/tcp/1/p2p/12D3KooWH616heUHYBjTMR8xAt6EEkCUGKD7BCVJSKJxyLP81YY7")
    assert health.current() == []  # it works, and has said no
    add = next(path for path in here.paths if "/add?" in path and "pin/" not in path)
    for option in ("cid-version=1", "raw-leaves=true", "chunker=size-1048576", "pin=true"):
        assert option in add


VERSIONS: dict[str, tuple[Scene, str]] = {
    **BROKEN,
    "no JSON": (lambda r: r.reply(b"<html>hello</html>"), "not JSON"),
    "endless nesting": (lambda r: r.reply(b"[" * 60_000), "not JSON"),
    "a list": (lambda r: r.reply(b"[1]"), "not the JSON of an IPFS daemon"),
    "no text": (lambda r: r.reply(b"\xff\xfe\x00"), "not JSON"),
    "other JSON": (lambda r: r.reply(b'{"Version":7}'), "no IPFS daemon"),
    "no version": (lambda r: r.reply(b'{"Version":"one"}'), "no IPFS daemon"),
    "too old": (lambda r: r.reply(b'{"Version":"0.4.23"}'), "too old"),
    "an error without words": (status(500, b'{"Message":{}}'), "no word why"),
}


@pytest.mark.parametrize("scene", VERSIONS)
async def test_a_daemon_that_can_not_be_used_is_one_health_entry(
    here: Site, daemon: Daemon, scene: str, health: Health
) -> None:
    answer, reason = VERSIONS[scene]
    daemon.calls["version"] = answer
    async with api(here.multiaddr, health, seconds=patience(reason)) as daemon_api:
        for call in (daemon_api.version, lambda: daemon_api.block(CID), lambda: daemon_api.pin(CID)):
            with trio.fail_after(30), pytest.raises(SourceFailed, match=reason):
                await call()
        assert not await daemon_api.check()
        [text] = texts(health, "ipfs-daemon")
        assert here.multiaddr in text
        assert "content.ipfs_api" in text
        del daemon.calls["version"]
        assert await daemon_api.check()
    assert health.current() == []


async def test_a_daemon_leads_nowhere_else(here: Site, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a redirect nor a proxy of the environment; no file's path is told."""
    with site(good) as elsewhere:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, elsewhere.url)
        daemon.calls["block/get"] = lambda request: request.reply(b"", 307, Location=f"{elsewhere.url}/block")
        async with api(here.multiaddr, Health()) as daemon_api:
            with pytest.raises(SourceFailed, match="HTTP 307"):
                await daemon_api.block(CID)
        assert elsewhere.paths == []


async def test_the_path_of_a_file_is_not_told(here: Site, tmp_path: Path) -> None:
    (tmp_path / "secret name").write_bytes(b"a layer")
    async with api(here.multiaddr, Health()) as daemon_api:
        await daemon_api.add(tmp_path / "secret name")
    [body] = [body for body in here.bodies if b"a layer" in body]
    assert b"secret" not in body and b"Abspath" not in body


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipfshttpclient", None)
    monkeypatch.delitem(sys.modules, "meshnode.ipfs.bounded_client", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'meshnode\[ipfs\]'"):
        IpfsApi("/ip4/127.0.0.1/tcp/5001", Health())


async def test_a_daemon_that_is_down(health: Health) -> None:
    async with api(f"/ip4/127.0.0.1/tcp/{dead_port()}", health) as daemon_api:
        assert not await daemon_api.check()
    [text] = texts(health, "ipfs-daemon")
    assert "can't be reached" in text


@pytest.mark.parametrize(
    "message", ["context deadline exceeded", "request timed out", "block was not found locally (offline): not found"]
)
async def test_a_daemon_without_the_block_is_well(here: Site, daemon: Daemon, message: str, health: Health) -> None:
    daemon.calls["block/get"] = lambda request: no(request, message)
    async with api(here.multiaddr, health) as daemon_api:
        with pytest.raises(ContentUnavailable) as caught:
            await daemon_api.block(CID)
    assert not isinstance(caught.value, SourceFailed)
    assert health.current() == []


BLOCKS: dict[str, tuple[Scene, str]] = {
    **BROKEN,
    "its disk is broken": (lambda r: no(r, "leveldb: corrupted"), "leveldb: corrupted"),
}


@pytest.mark.parametrize("scene", BLOCKS)
async def test_a_daemon_that_breaks_on_a_block(here: Site, daemon: Daemon, scene: str, health: Health) -> None:
    answer, reason = BLOCKS[scene]
    daemon.calls["block/get"] = answer
    async with api(here.multiaddr, health, seconds=patience(reason)) as daemon_api:
        with trio.fail_after(30), pytest.raises(SourceFailed, match=reason):
            await daemon_api.block(CID)
    assert len(texts(health, "ipfs-daemon")) == 1


async def test_a_daemon_with_bad_data_is_not_asked_again_and_stays_named(
    here: Site, daemon: Daemon, health: Health
) -> None:
    daemon.calls["block/get"] = wrong
    async with api(here.multiaddr, health) as daemon_api:
        sources: list[Source] = [daemon_api]
        outside = Fallback(sources)
        for _ in range(2):
            with pytest.raises(ContentUnavailable):
                await outside.block(CID)
        assert await daemon_api.check()
    assert sum("/block/get" in path for path in here.paths) == 1
    [text] = texts(health, "ipfs-daemon")
    assert "not the block" in text


ADDS: dict[str, tuple[Scene, str]] = {
    "another CID": (lambda r: r.reply(b'{"Hash":"%s"}\n' % CID.encode()), "it made"),
    "no CID": (lambda r: r.reply(b'{"Hash":"../../etc"}\n'), "CID"),
    "an old CID": (lambda r: r.reply(b'{"Hash":"QmPZ9gcCEpqKTo6aq61g2nXGUhM4iCL3ewB6LDXZCtioEB"}\n'), "it made"),
    "a strange base58": (lambda r: r.reply(b'{"Hash":"z%s"}\n' % (b"1" * 300)), "CID"),
    "nothing": (lambda r: r.reply(b""), "not JSON"),
    "a flood of progress": (flood, "more than"),
    "HTTP 500": (status(500), "no word why"),
}


@pytest.mark.parametrize("scene", ADDS)
async def test_a_daemon_that_adds_wrongly(
    here: Site, daemon: Daemon, scene: str, tmp_path: Path, health: Health
) -> None:
    answer, reason = ADDS[scene]
    daemon.calls["add"] = answer
    source = tmp_path / "layer.bin"
    source.write_bytes(b"a layer")
    async with api(here.multiaddr, health) as daemon_api:
        with pytest.raises(SourceFailed, match=reason):
            await daemon_api.add(source)
        assert len(texts(health, "ipfs-daemon")) == 1
        with pytest.raises(ModelError, match="missing"):
            await daemon_api.add(tmp_path / "missing")


PINS: dict[str, Callable[[Request], None]] = {
    "another one": lambda r: r.reply(json.dumps({"Pins": [cid_of(RAW, b"other")]}).encode()),
    "no list": lambda r: r.reply(b'{"Pins":"yes"}'),
    "nonsense": lambda r: r.reply(b'{"Pins":[7,null]}'),
}


@pytest.mark.parametrize("scene", PINS)
async def test_a_daemon_that_pins_something_else(here: Site, daemon: Daemon, scene: str, health: Health) -> None:
    daemon.calls["pin/add"] = PINS[scene]
    async with api(here.multiaddr, health) as daemon_api:
        with pytest.raises(SourceFailed, match="pinned something else"):
            await daemon_api.pin(CID)
    assert len(texts(health, "ipfs-daemon")) == 1
