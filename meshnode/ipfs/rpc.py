"""An operator's IPFS daemon through its RPC (docs.ipfs.tech/reference/kubo/rpc): Kubo, or js-ipfs.

The daemon is asked by ipfshttpclient (`bounded_client.py`), every answer bounded in bytes and seconds and read as if
it came from a stranger; every CID is computed here again. What is wrong with it stands in one health entry,
`ipfs-daemon`.
"""

from __future__ import annotations

import functools
import io
import ipaddress
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar

import trio

from meshnode.core.errors import ConfigError, ContentUnavailable, ModelError, TransientError
from meshnode.core.health import Health
from meshnode.ipfs.car_tree import BEGIN_S, take_tree
from meshnode.ipfs.http import HttpTrouble, Refusal
from meshnode.ipfs.source_order import OnBlock, SourceFailed
from protocols.bitswap.messages import MAX_BLOCK_BYTES
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import DAG_CBOR, Cid, PeerId, base58_decode, cid_codec, cid_from_bytes, cid_of_old
from protocols.kad.address import address_bytes
from protocols.unixfs.builder import Builder
from protocols.unixfs.layout import CHUNK_BYTES

if TYPE_CHECKING:
    from meshnode.ipfs.bounded_client import BoundedClient

BLOCK_S: Final = 10.0  # the daemon may have to find the block itself
CALL_S: Final = 10.0  # version, id, connect, unpin: nothing to move
PIN_S: Final = 600.0  # the daemon may have to fetch the whole file
MARGIN_S: Final = 3.0  # beyond the time that the daemon is given, for its word that it found nothing
ADD_BYTES_PER_S: Final = 1 << 20  # a disk that writes more slowly is not waited for
CHECK_S: Final = 60.0
OLDEST: Final = (0, 5)  # since then the RPC takes POST alone and knows `cid-base`
MAX_JSON_BYTES: Final = 1 << 16
MAX_ADDRESSES: Final = 16  # of the daemon; a busy one lists a few dozen, most of them for other transports
_VERSION: Final = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})(?:[.\-+][0-9A-Za-z.\-+]{0,60})?")
# What Kubo and js-ipfs answer, with HTTP 500, about a block that they can't get.
_ABSENT: Final = re.compile("deadline exceeded|timed? ?out|not found|could not find|notfound", re.IGNORECASE)
_NOT_PINNED: Final = re.compile("not pinned|pinned indirectly", re.IGNORECASE)
# How to say that a block is dag-cbor: js-ipfs knows `format` alone, which Kubo calls deprecated. Each ignores what it
# does not know and makes another CID.
_DAG_CBOR: Final = ({"format": "dag-cbor"}, {"cid-codec": "dag-cbor"})

Result = TypeVar("Result")


class DaemonRefused(TransientError):
    """The daemon is well and says no; the text holds its words."""


class IpfsApi:
    """A daemon's RPC. Implements the port `Source`.

    Every method raises SourceFailed when the daemon can't be used, after it said so in the health of the node,
    and DaemonRefused when the daemon works and refuses. If cancelled: the request is dropped; what the daemon
    has done by then stays done.
    """

    def __init__(
        self,
        address: str,
        health: Health,
        *,
        block_s: float = BLOCK_S,
        call_s: float = CALL_S,
        margin_s: float = MARGIN_S,
        check_s: float = CHECK_S,
    ) -> None:
        """
        Args:
          address: multiaddr of the RPC, /ip4/127.0.0.1/tcp/5001.
          block_s: how long the daemon may look for one block.
          check_s: how often `run` looks whether the daemon is well.

        Raises ConfigError when ipfshttpclient is not installed.
        """
        _, kind, host, _, _ = address.split("/")
        self.address = address
        self.local = host == "localhost" or (kind in ("ip4", "ip6") and ipaddress.ip_address(host).is_loopback)
        self.name = f"the IPFS daemon at {address}"
        self._health = health
        self._block_s = block_s
        self._call_s = call_s
        self._margin_s = margin_s
        self._check_s = check_s
        self._client = _client(address)
        self._fit = False  # the daemon told a version that we can talk to
        self._bad_data = ""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look now and then whether the daemon is well, until cancelled."""
        task_status.started()
        while True:
            await self.check()
            await trio.sleep(self._check_s)

    async def check(self) -> bool:
        """Whether the daemon can be used; the health of the node says why not."""
        try:
            await self.version()
        except (SourceFailed, DaemonRefused):
            return False
        return True

    # What the daemon is asked

    async def version(self) -> str:
        """The daemon's version, one that we can talk to."""
        self._fit = False
        text = _text(await self._json(lambda client: client.version()), "Version")
        match = _VERSION.fullmatch(text)
        if match is None:
            raise self._failed(f"it says that its version is {text[:40]!r}, which no IPFS daemon does")
        if (int(match[1]), int(match[2])) < OLDEST:
            raise self._failed(
                f"its version {text} is too old; {OLDEST[0]}.{OLDEST[1]} is the first that can be used"
            )
        self._fit = True
        self._well()
        return text

    async def identity(self) -> tuple[PeerId, tuple[str, ...]]:
        """The peer id under which other IPFS nodes know the daemon, and where it listens for us.

        The addresses are those with TCP, each with the peer id at its end, at most MAX_ADDRESSES.
        """
        async with self._working():
            answer = await self._json(lambda client: client.id())
            text = _text(answer, "ID")
            if not text.isalnum() or not text.isascii() or not 40 <= len(text) <= 64:
                raise self._failed(f"it says that its peer id is {text[:60]!r}")
            addresses = _dialable(answer.get("Addresses"), text)
            if not addresses:  # js-ipfs names them here alone, and the library does not know the call
                local = await self._json(lambda client: client._client.request("/swarm/addrs/local", decoder="json"))
                addresses = _dialable(local.get("Strings"), text)
        return PeerId(text), addresses

    async def block(self, cid: Cid) -> bytes:
        """What the daemon gives under this CID, not verified. Raises ContentUnavailable besides."""
        seconds = self._block_s
        async with self._working():
            try:
                return await self._call(
                    lambda client: bytes(client.block.get(cid, opts={"timeout": _duration(seconds)})),
                    seconds=seconds + self._margin_s,
                    limit_bytes=MAX_BLOCK_BYTES,
                )
            except DaemonRefused as error:
                if _ABSENT.search(str(error)):
                    raise ContentUnavailable(f"{self.name} does not have {cid}", cid=cid) from error
                raise self._failed(f"it can't read blocks: {error}") from error

    async def tree(self, root: Cid, size: int, on_block: OnBlock) -> None:
        """Hand over the blocks of a file while the daemon exports it. See the port."""
        seconds = self._block_s + self._margin_s
        async with self._working():
            try:
                async with self._client.stream(
                    lambda client: client.dag.export(root, stream=True, opts={"progress": "false"}),
                    seconds=min(seconds, BEGIN_S),
                ) as answer:
                    await take_tree(self.name, answer, root, size, on_block, seconds)
            except (HttpTrouble, Refusal, SourceFailed) as error:
                # It may be looking for blocks that it lacks, so that this is no reason for alarm.
                raise ContentUnavailable(f"{self.name} does not export {root}: {error}", cid=root) from error

    async def add(self, source: Path, *, pin: bool = True) -> Cid:
        """Give the daemon a copy of a file. Returns its CID, which is computed here while it is sent.

        Raises SourceFailed also when the daemon made another CID, ModelError when the file can't be read.
        """
        builder = Builder()

        def work(client: Any) -> Any:
            with _Upload(source, builder) as upload:
                return client.add(
                    upload,
                    pin=_flag(pin),
                    raw_leaves=_flag(True),
                    cid_version=1,
                    chunker=f"size-{CHUNK_BYTES}",
                    opts={"cid-base": "base32", "progress": _flag(False)},
                )

        async with self._working():
            try:
                size = (await trio.Path(source).stat()).st_size
            except OSError as error:
                raise ModelError(f"can't read {source}: {error.strerror or error}") from error
            answer = await self._json(work, seconds=self._call_s + size / ADD_BYTES_PER_S)
            theirs = self._cid(_text(answer, "Hash"))
            ours = builder.finish().root
            if theirs != ours:
                raise self._failed(f"it made {theirs} of {source.name}, which is {ours}")
        return ours

    async def put(self, block: bytes, cid: Cid) -> None:
        """Give the daemon a block of its own, one of dag-cbor. It is not pinned.

        Raises SourceFailed also when the daemon made another CID.
        """
        if cid_codec(cid) != DAG_CBOR:
            raise LocalProtocolError(f"{cid} is no block of dag-cbor")
        theirs, refusal = "", None
        async with self._working():
            for spelling in _DAG_CBOR:
                options = {**spelling, "mhtype": "sha2-256", "cid-base": "base32", "pin": _flag(False)}
                put = functools.partial(_put, block, options)
                try:
                    theirs = _text(await self._json(put), "Key")
                except DaemonRefused as error:
                    refusal = error
                    continue
                if self._cid(theirs) == cid:
                    return
            if not theirs and refusal is not None:
                raise refusal
            raise self._failed(f"it made {theirs[:80]} of the block {cid}")

    async def pinned(self, cid: Cid, *, recursive: bool = True) -> bool:
        """Whether the daemon keeps a whole file; not `recursive`: this block, whatever happens to others."""
        async with self._working():
            for kind in ("recursive",) if recursive else ("recursive", "direct"):
                try:
                    answer = await self._json(functools.partial(_list_pins, cid, kind))
                except DaemonRefused as error:
                    if not _NOT_PINNED.search(str(error)):
                        raise
                    continue
                keys = answer.get("Keys")
                if not isinstance(keys, dict) or [self._cid(key) for key in keys] != [cid]:
                    raise self._failed(f"it was asked whether it pins {cid} and speaks of something else")
                return True
            return False

    async def pin(self, cid: Cid, *, recursive: bool = True, seconds: float = PIN_S) -> None:
        """Have the daemon keep a whole file, fetching what it lacks, for `seconds` at most.

        Not `recursive`: one block alone, for a manifest, whose links lead to more than anybody may have.
        """
        async with self._working():
            answer = await self._json(
                lambda client: client.pin.add(cid, recursive=_flag(recursive), opts={"timeout": _duration(seconds)}),
                seconds=seconds,
            )
            pins = answer.get("Pins")
            if not isinstance(pins, list) or cid not in [self._cid(item) for item in pins if isinstance(item, str)]:
                raise self._failed(f"it was to pin {cid} and says that it pinned something else")

    async def unpin(self, cid: Cid) -> None:
        """Let the daemon forget a file or block; nothing happens when it is not pinned."""
        async with self._working():
            try:
                await self._json(lambda client: client.pin.rm(cid, recursive=_flag(True)))
            except DaemonRefused as error:
                if not _NOT_PINNED.search(str(error)):
                    raise

    async def connect(self, address: str) -> None:
        """Have the daemon dial a peer, /ip4/192.0.2.1/tcp/4331/p2p/12D3KooW…"""
        options = {"timeout": _duration(self._call_s)}
        async with self._working():
            await self._json(lambda client: client.swarm.connect(address, opts=options))

    def sent_bad_data(self, cid: Cid) -> None:
        """See the port."""
        self._bad_data = (
            f"it gave bytes that are not the block {cid}, so it is not asked for blocks until the next start"
        )
        self._health.set("ipfs-daemon", address=self.address, reason=self._bad_data)

    # One call

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[None]:
        """For calls of a daemon of a version that we can talk to; it is well when they come back."""
        if not self._fit:
            await self.version()
        yield
        self._well()

    def _well(self) -> None:
        if not self._bad_data:
            self._health.clear("ipfs-daemon")

    def _failed(self, reason: str) -> SourceFailed:
        self._health.set("ipfs-daemon", address=self.address, reason=self._bad_data or reason)
        return SourceFailed(reason)

    async def _call(self, work: Callable[[Any], Result], *, seconds: float, limit_bytes: int) -> Result:
        try:
            return await self._client.call(work, seconds=seconds, limit_bytes=limit_bytes)
        except HttpTrouble as error:
            raise self._failed(str(error)) from error
        except Refusal as error:
            raise DaemonRefused(f"{self.name} says: {error}") from error

    async def _json(self, work: Callable[[Any], Any], *, seconds: float | None = None) -> dict[str, object]:
        """The one JSON object that a call gives."""
        limit = (self._call_s if seconds is None else seconds) + self._margin_s
        answer = await self._call(lambda client: _unwrapped(work(client)), seconds=limit, limit_bytes=MAX_JSON_BYTES)
        if not isinstance(answer, dict):
            raise self._failed(
                "its answer is not the JSON of an IPFS daemon, so another program may use that address"
            )
        return answer

    def _cid(self, text: str) -> Cid:
        """A CID as daemons write it, base32 or base58btc, in our spelling."""
        try:
            return cid_from_bytes(base58_decode(text[1:])) if text.startswith("z") else cid_of_old(text)
        except RemoteProtocolError as error:
            raise self._failed(f"it answers with a CID that was not asked for: {error}") from error


class _Upload(io.RawIOBase):
    """A file that is hashed while it is read, in the thread of its call.

    It tells the daemon no path: the library sends that of every file that has one.
    """

    name = "file"

    def __init__(self, source: Path, builder: Builder) -> None:
        self._source = source
        self._builder = builder
        try:
            self._file: IO[bytes] = source.open("rb")
        except OSError as error:
            raise ModelError(f"can't read {source}: {error.strerror or error}") from error

    def read(self, size: int = -1) -> bytes:
        try:
            piece = self._file.read(size)
        except OSError as error:
            raise ModelError(f"can't read {self._source}: {error.strerror or error}") from error
        self._builder.update(piece)
        return piece

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _client(address: str) -> BoundedClient:
    try:
        from meshnode.ipfs.bounded_client import BoundedClient
    except ImportError as error:
        raise ConfigError(
            "content.ipfs_api needs the package ipfshttpclient, which is not installed here; install it with: "
            "pip install 'meshnode[ipfs]'"
        ) from error
    return BoundedClient(address)


def _put(block: bytes, options: dict[str, str], client: Any) -> Any:
    return client.block.put(io.BytesIO(block), opts=dict(options))


def _list_pins(cid: Cid, kind: str, client: Any) -> Any:
    return client.pin.ls(cid, type=kind)


def _unwrapped(answer: Any) -> object:
    if isinstance(answer, list):  # of a call that the library does not know
        [answer] = answer
        return answer
    return answer.as_json()


def _flag(value: bool) -> str:
    """The library would write True, which not every daemon reads."""
    return "true" if value else "false"


def _text(answer: Mapping[str, object], key: str) -> str:
    value = answer.get(key)
    return value if isinstance(value, str) else ""


def _duration(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


def _dialable(listed: object, peer: str) -> tuple[str, ...]:
    """Those of the daemon's addresses that we can dial; it lists others for QUIC, WebSockets and relays."""
    found: list[str] = []
    for item in listed if isinstance(listed, list) else ():
        where, _, owner = item.partition("/p2p/") if isinstance(item, str) else ("", "", "")
        try:
            address_bytes(where)
        except LocalProtocolError:
            continue
        if owner in ("", peer) and not where.endswith("/tcp/0"):
            found.append(f"{where}/p2p/{peer}")
    return tuple(dict.fromkeys(found))[:MAX_ADDRESSES]
