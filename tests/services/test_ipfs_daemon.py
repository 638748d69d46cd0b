"""The operator's IPFS daemon: met as a guest, supplied with the served model, away and back again."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import trio

from meshnode.core.health import Health
from meshnode.core.signal import Changes
from meshnode.ipfs.rpc import IpfsApi
from meshnode.services import ipfs_daemon as daemon
from meshnode.services.external_peers import ExternalPeers, ExternalSettings
from meshnode.services.ipfs_daemon import IpfsDaemonService, Publication
from meshnode.sim.network import MemoryHost, MemoryNetwork
from meshnode.state.database import Database
from meshnode.store.blob_store import BlobStore
from protocols.advert.messages import Holding
from protocols.bitswap.messages import PROTOCOL
from protocols.ids import DAG_CBOR, RAW, Cid, PeerId, base58_encode, cid_of, cid_to_bytes
from protocols.unixfs.builder import file_cid
from tests.http_server import Request, Site, drip, flood, silence, site, truncate
from tests.unit.membership_actors import peer_of_key

US, DAEMON, MEMBER, OTHER = (peer_of_key(name) for name in ("us", "daemon", "member", "other"))
MANIFESTS = (b"\xa1\x61a\x01", b"\xa1\x61b\x02")
FILES = tuple(bytes([number]) * size for number, size in enumerate((10, (1 << 20) + 5, 0, 777)))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEET_S", "FIRST_PAUSE_S", "FIRST_REST_S"):
        monkeypatch.setattr(daemon, name, 0.02)


class FakeDaemon:
    """A daemon's RPC with a memory. `spelling`: how it wants to be told that a block is dag-cbor."""

    def __init__(self, peer: PeerId = DAEMON, address: str = "", spelling: tuple[str, str] = ("format", "dag-cbor")):
        self.peer = peer
        self.address = address or f"/ip4/127.0.0.1/tcp/4001/p2p/{peer}"
        self.spelling = spelling
        self.blocks: set[Cid] = set()
        self.pins: dict[Cid, str] = {}
        self.dialled: list[str] = []
        self.added: list[Cid] = []
        self.refuses: dict[str, str] = {}  # call -> its words
        self.wrong = False  # makes another CID of every file
        self.scene: Callable[[Request], None] | None = None  # in place of all that

    def __call__(self, request: Request) -> None:
        (self.scene or self.answer)(request)

    def answer(self, request: Request) -> None:
        url = urlsplit(request.path)
        call = url.path.removeprefix("/api/v0/")
        if call in self.refuses:
            self._refuse(request, self.refuses[call])
            return
        options = {name: values[0] for name, values in parse_qs(url.query).items()}
        getattr(self, "on_" + call.replace("/", "_"))(request, options)

    @staticmethod
    def _say(request: Request, **answer: object) -> None:
        request.reply(json.dumps(answer).encode())

    @staticmethod
    def _refuse(request: Request, words: str) -> None:
        request.reply(json.dumps({"Message": words, "Code": 0, "Type": "error"}).encode(), 500)

    @staticmethod
    def _file(request: Request) -> bytes:
        body = request.body.partition(b"\r\n\r\n")[2]
        return body[: body.rindex(b"\r\n--")]

    def on_version(self, request: Request, _: dict[str, str]) -> None:
        self._say(request, Version="0.35.0")

    def on_id(self, request: Request, _: dict[str, str]) -> None:
        self._say(request, ID=self.peer, Addresses=[self.address, "/ip4/127.0.0.1/udp/4001/quic-v1"])

    def on_swarm_connect(self, request: Request, options: dict[str, str]) -> None:
        self.dialled.append(options["arg"])
        self._say(request, Strings=[f"connect {US} success"])

    def on_add(self, request: Request, options: dict[str, str]) -> None:
        assert options["pin"] == "false"
        cid = file_cid(self._file(request) + b"x" * self.wrong)
        self.added.append(cid)
        self.blocks.add(cid)
        self._say(request, Name="x", Hash=cid, Size="1")

    def on_block_put(self, request: Request, options: dict[str, str]) -> None:
        name, value = self.spelling
        if name == "format" and options.get("format") not in (None, value):
            self._refuse(request, f"unrecognized format: {options['format']}")
            return
        cid = cid_of(DAG_CBOR if options.get(name) == value else RAW, self._file(request))
        self.added.append(cid)
        self.blocks.add(cid)
        self._say(request, Key=cid, Size=1)

    def on_pin_ls(self, request: Request, options: dict[str, str]) -> None:
        if self.pins.get(Cid(options["arg"])) != options["type"]:
            self._refuse(request, f"path '/ipfs/{options['arg']}' is not pinned")
        else:  # as js-ipfs spells it
            name = "z" + base58_encode(cid_to_bytes(options["arg"]))
            self._say(request, Keys={name: {"Type": options["type"]}})

    def on_pin_add(self, request: Request, options: dict[str, str]) -> None:
        cid = Cid(options["arg"])
        assert cid in self.blocks, "it would look for this for ever"
        self.pins[cid] = "recursive" if options["recursive"] == "true" else "direct"
        assert cid not in MANIFEST_CIDS or self.pins[cid] == "direct", "it would look for files that nobody has"
        self._say(request, Pins=[cid])

    def on_pin_rm(self, request: Request, options: dict[str, str]) -> None:
        if self.pins.pop(Cid(options["arg"]), None) is None:
            self._refuse(request, "not pinned or pinned indirectly")
        else:
            self._say(request, Pins=[options["arg"]])


MANIFEST_CIDS = tuple(cid_of(DAG_CBOR, block) for block in MANIFESTS)
FILE_CIDS = tuple(file_cid(data) for data in FILES)


@dataclass(frozen=True)
class Release:
    """As much of a served release as the daemon is concerned with; its manifest is this, too."""

    title: str
    cid: Cid
    files: tuple[Cid, ...]

    @property
    def manifest(self) -> Release:
        return self

    def all_files(self) -> tuple[Cid, ...]:
        return self.files


class Model:
    """What the network serves, and what of it the node holds."""

    def __init__(self, current: Release | None = None) -> None:
        self.current = current
        self.changes = Changes()

    def serve(self, release: Release | None) -> None:
        self.current = release
        self.changes.notify()

    def holdings(self) -> tuple[Holding, ...]:
        return ()


class Us:
    """The network."""

    def roles_of(self, peer: PeerId) -> frozenset[str]:
        return frozenset({"node"} if peer == MEMBER else ())


FIRST = Release("first int4", MANIFEST_CIDS[0], FILE_CIDS[:3])
SECOND = Release("second int4", MANIFEST_CIDS[1], FILE_CIDS[2:])


class World:
    """A node with a store, and a daemon beside it."""

    def __init__(self, folder: Path, here: Site, fake: FakeDaemon, host: MemoryHost) -> None:
        self.fake = fake
        self.host = host
        self.store = BlobStore(folder / "store", 1 << 30)
        self.records = Database(folder / "state.sqlite")
        self.health = Health()
        self.model = Model(FIRST)
        self.us = Us()
        self.guests = ExternalPeers(
            host, ExternalSettings(protocols=(PROTOCOL,)), random.Random(1), health=self.health
        )
        self.api = IpfsApi(here.multiaddr, self.health, call_s=0.5, margin_s=0, check_s=3600)
        self.folder = folder

    def hold(self, *files: bytes) -> None:
        for number, data in enumerate(files):
            source = self.folder / f"file-{number}"
            source.write_bytes(data)
            self.store.add_file(source, pin="test")
        for block in MANIFESTS:
            self.store.put_block(block, DAG_CBOR)
        self.model.changes.notify()

    def service(self, *, publish: bool = True) -> IpfsDaemonService:
        publication = Publication(
            self.api,
            self.store,
            self.records,
            self.health,
            held=self.model,
            releases=self.model if publish else None,
        )
        return IpfsDaemonService(self.api, self.host, self.guests, self.us, publication, self.health)

    @asynccontextmanager
    async def running(self, *, publish: bool = True) -> AsyncIterator[IpfsDaemonService]:
        """A start of the node, until its end."""
        service = self.service(publish=publish)
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            yield service
            nursery.cancel_scope.cancel()

    def texts(self, code: str) -> list[str]:
        return [shown.text for shown in self.health.current() if shown.code == code]


@asynccontextmanager
async def world(folder: Path, fake: FakeDaemon | None = None) -> AsyncIterator[World]:
    fake = FakeDaemon() if fake is None else fake
    network = MemoryNetwork()
    host = network.host(US)
    with site(fake) as here:
        it = World(folder, here, fake, host)
        async with trio.open_nursery() as nursery:
            for part in (host, it.guests, it.api):
                await nursery.start(part.run)
            with trio.fail_after(60):
                yield it
            nursery.cancel_scope.cancel()
        it.store.close()
        it.records.close()


async def until(true: Callable[[], object]) -> None:
    """The other side is a thread behind HTTP: there is no event to wait for."""
    with trio.fail_after(20):
        while not true():  # noqa: ASYNC110
            await trio.sleep(0.01)


# ---------------------------------------------------------------- meeting


@pytest.fixture
async def it(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


async def test_the_daemon_is_a_guest_and_is_told_where_we_are(it: World) -> None:
    async with it.running(publish=False):
        await until(lambda: it.fake.dialled)
        assert it.guests.configured == (DAEMON,)
        assert set(it.fake.dialled) == set(it.host.addresses)
        await until(lambda: it.guests.failures())  # nobody listens there in this test
    assert it.health.current() == []


async def test_a_daemon_with_another_identity_takes_the_place_of_the_first(it: World) -> None:
    async with it.running():
        await until(lambda: it.guests.configured == (DAEMON,))
        it.fake.peer = OTHER
        it.fake.address = "/ip4/127.0.0.1/tcp/4002"
        await until(lambda: it.guests.configured == (OTHER,))


@pytest.mark.parametrize("peer", [MEMBER, US])
async def test_a_daemon_that_says_it_is_one_of_us_is_no_guest(tmp_path: Path, peer: PeerId) -> None:
    async with world(tmp_path, FakeDaemon(peer)) as it, it.running():
        it.hold(*FILES)
        await until(lambda: it.texts("ipfs-daemon"))
        assert "a node of this network" in it.texts("ipfs-daemon")[0]
        assert it.guests.configured == ()
        assert it.fake.added == []


async def test_a_daemon_that_does_not_reach_us_is_used_all_the_same(it: World) -> None:
    it.hold(*FILES)
    it.fake.refuses["swarm/connect"] = "failed to dial: no muxer in common"
    async with it.running():
        await until(lambda: len(it.fake.pins) == 4)
    assert it.health.current() == []


# ---------------------------------------------------------------- publishing


async def test_what_the_node_holds_of_the_served_model_is_kept(it: World) -> None:
    it.hold(FILES[0], FILES[3])
    async with it.running() as service:
        await until(lambda: len(service.published) == 2)
        assert it.fake.pins == {FIRST.cid: "direct", FILE_CIDS[0]: "recursive"}
        it.hold(FILES[1])  # it takes over another layer
        await until(lambda: FILE_CIDS[1] in it.fake.pins)
    assert it.fake.added == [FIRST.cid, FILE_CIDS[0], FILE_CIDS[1]]
    async with it.running() as service:  # starts again
        await until(lambda: len(service.published) == 3)
    assert len(it.fake.added) == 3
    assert it.health.current() == []


async def test_a_pin_that_somebody_took_away_is_made_again(it: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "RECHECK_S", 0.1)
    it.hold(*FILES)
    async with it.running():
        await until(lambda: len(it.fake.pins) == 4)
        del it.fake.pins[FILE_CIDS[0]]
        await until(lambda: FILE_CIDS[0] in it.fake.pins)
        assert it.fake.added.count(FILE_CIDS[1]) == 1


async def test_nothing_is_published_that_was_not_asked_for(it: World) -> None:
    it.hold(*FILES)
    async with it.running(publish=False):
        await until(lambda: len(it.fake.dialled) > 3)
    assert it.fake.added == []
    async with it.running():
        await until(lambda: len(it.fake.pins) == 4)
    it.fake.pins[FILE_CIDS[3]] = "recursive"  # the operator's own
    async with it.running(publish=False):  # the owner has changed their mind
        await until(lambda: it.fake.pins == {FILE_CIDS[3]: "recursive"})


async def test_the_daemon_moves_with_the_network_and_keeps_what_is_its_owners(it: World) -> None:
    it.hold(*FILES)
    it.fake.pins[FILE_CIDS[0]] = "recursive"  # the operator had it before
    it.fake.pins[FIRST.cid] = "recursive"
    async with it.running():
        await until(lambda: len(it.fake.pins) == 4)
        assert set(it.fake.added) == {FILE_CIDS[1], FILE_CIDS[2]}
        it.model.serve(None)  # not known for a while
        await trio.sleep(0.1)
        assert len(it.fake.pins) == 4
    it.model.serve(SECOND)  # while the node was away
    async with it.running():
        await until(lambda: SECOND.cid in it.fake.pins and FILE_CIDS[3] in it.fake.pins)
        await until(lambda: FILE_CIDS[1] not in it.fake.pins)
        assert set(it.fake.pins) == {FIRST.cid, FILE_CIDS[0], SECOND.cid, *FILE_CIDS[2:]}


@pytest.mark.parametrize("spelling", [("format", "dag-cbor"), ("cid-codec", "dag-cbor")])
async def test_every_daemon_is_told_the_codec_in_its_own_words(tmp_path: Path, spelling: tuple[str, str]) -> None:
    async with world(tmp_path, FakeDaemon(spelling=spelling)) as it:
        it.hold()
        async with it.running():
            await until(lambda: FIRST.cid in it.fake.pins)
        assert it.health.current() == []


async def test_a_wrong_cid_is_named_not_pinned_and_tried_again(it: World) -> None:
    it.hold(*FILES)
    it.fake.wrong = True
    async with it.running():
        await until(lambda: it.texts("ipfs-publish"))
        [text] = it.texts("ipfs-publish")
        assert "it made" in text and it.api.address in text and FIRST.title in text
        assert set(it.fake.pins) == {FIRST.cid}
        it.fake.wrong = False
        await until(lambda: len(it.fake.pins) == 4)
        await until(lambda: it.health.current() == [])


async def test_a_daemon_that_refuses_is_quoted(it: World) -> None:
    it.hold(*FILES)
    it.fake.refuses["pin/add"] = "no space left on device"
    async with it.running():
        await until(lambda: it.texts("ipfs-publish"))
        assert "no space left on device" in it.texts("ipfs-publish")[0]
        it.fake.refuses.clear()
        await until(lambda: len(it.fake.pins) == 4)
        await until(lambda: it.health.current() == [])


async def test_a_file_that_changed_on_the_disk_is_not_given_away(it: World, tmp_path: Path) -> None:
    it.hold(*FILES)

    class Damaged(BlobStore):
        def path(self, cid: Cid) -> Path | None:
            return tmp_path / "file-3" if cid == FILE_CIDS[0] else super().path(cid)

    it.store.close()
    it.store = Damaged(tmp_path / "store", 1 << 30)
    async with it.running():
        await until(lambda: len(it.fake.pins) == 3)
        await until(lambda: it.texts("ipfs-publish"))
        assert "meshnode model verify" in it.texts("ipfs-publish")[0]
        await trio.sleep(0.2)
        assert FILE_CIDS[0] not in it.fake.pins
        assert it.fake.added.count(FILE_CIDS[3]) == 1
        assert it.texts("ipfs-publish")


# ---------------------------------------------------------------- away and back


def _garbage(request: Request) -> None:
    request.reply(b"<html>a router</html>")


def _too_old(request: Request) -> None:
    request.reply(b'{"Version":"0.4.22"}')


@pytest.mark.parametrize(
    "scene",
    [silence, drip, flood, truncate, _garbage, _too_old],
    ids=["silent", "slow", "flooding", "breaking off", "garbage", "too old"],
)
async def test_a_daemon_that_fails_is_one_entry_and_is_supplied_when_it_is_back(
    it: World, scene: Callable[[Request], None]
) -> None:
    it.hold(*FILES)
    it.fake.scene = scene
    async with it.running():
        await until(lambda: it.texts("ipfs-daemon"))
        assert [shown.code for shown in it.health.current()] == ["ipfs-daemon"]
        assert it.api.address in it.texts("ipfs-daemon")[0]
        it.fake.scene = None
        await until(lambda: len(it.fake.pins) == 4)
        await until(lambda: it.health.current() == [])
        it.fake.scene = scene  # in the middle of a quiet time
        await until(lambda: it.texts("ipfs-daemon"))
        it.fake.scene = None
        it.fake.pins.clear()  # it lost its repository
        await until(lambda: len(it.fake.pins) == 4)


async def test_an_upload_that_is_broken_off_is_taken_up_again(it: World) -> None:
    it.hold(*FILES)
    uploads: list[str] = []

    def scene(request: Request) -> None:
        if "/api/v0/add" in request.path and len(uploads) < 2:
            uploads.append(request.path)
            truncate(request)
        else:
            it.fake.answer(request)

    it.fake.scene = scene
    async with it.running():
        await until(lambda: len(it.fake.pins) == 4)
    assert len(uploads) == 2
