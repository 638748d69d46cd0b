"""An operator's IPFS daemon through its RPC (docs.ipfs.tech/reference/kubo/rpc): Kubo, or js-ipfs.

The daemon is asked over plain HTTP, every answer bounded in bytes and seconds and read as if it came from a
stranger; every CID is computed here again. What is wrong with it stands in one health entry, `ipfs-daemon`.

Not ipfshttpclient: its 0.8.0a2 reads a block of any size into memory, has no limit for a whole answer in time
(a daemon that sends a byte now and then holds a thread for ever) and ends a deeply nested answer in a
RecursionError.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Final

import trio

from meshnode.core.errors import ContentUnavailable, ModelError, TransientError
from meshnode.core.health import Health
from meshnode.ipfs.car_tree import BEGIN_SECONDS, take_tree
from meshnode.ipfs.fallback import SourceFailed, Take
from meshnode.ipfs.http import HttpTrouble, Reply, ask, http_client, opened
from meshnode.net.addresses import parse_address
from protocols.bitswap.messages import MAX_BLOCK_BYTES
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import DAG_CBOR, Cid, PeerId, base58_decode, cid_codec, cid_from_bytes, cid_of_old
from protocols.unixfs.builder import Builder
from protocols.unixfs.layout import CHUNK_BYTES

BLOCK_SECONDS: Final = 10.0  # the daemon may have to find the block itself
CALL_SECONDS: Final = 10.0  # version, id, connect, unpin: nothing to move
PIN_SECONDS: Final = 600.0  # the daemon may have to fetch the whole file
MARGIN_SECONDS: Final = 3.0  # beyond the time that the daemon is given, for its word that it found nothing
ADD_BYTES_PER_SECOND: Final = 1 << 20  # a disk that writes more slowly is not waited for
CHECK_SECONDS: Final = 60.0
OLDEST: Final = (0, 5)  # since then the RPC takes POST alone and knows `cid-base`
MAX_JSON_BYTES: Final = 1 << 16
MAX_ADDRESSES: Final = 16  # of the daemon; a busy one lists a few dozen, most of them for other transports
_PIECE_BYTES: Final = 1 << 20
_VERSION: Final = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})(?:[.\-+][0-9A-Za-z.\-+]{0,60})?")
# What Kubo and js-ipfs answer, with HTTP 500, about a block that they can't get.
_ABSENT: Final = re.compile("deadline exceeded|timed? ?out|not found|could not find|notfound", re.IGNORECASE)
_NOT_PINNED: Final = re.compile("not pinned|pinned indirectly", re.IGNORECASE)
# How to say that a block is dag-cbor: js-ipfs and Kubo before 0.13 know `format` alone, which newer Kubos call
# deprecated, and each ignores what it does not know and makes another CID; the oldest have another name for it.
_DAG_CBOR: Final = ({"format": "dag-cbor"}, {"cid-codec": "dag-cbor"}, {"format": "cbor"})


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
        block_seconds: float = BLOCK_SECONDS,
        call_seconds: float = CALL_SECONDS,
        margin_seconds: float = MARGIN_SECONDS,
        check_seconds: float = CHECK_SECONDS,
    ) -> None:
        """
        Args:
          address: multiaddr of the RPC, /ip4/127.0.0.1/tcp/5001.
          block_seconds: how long the daemon may look for one block.
          check_seconds: how often `run` looks whether the daemon is well.
        """
        _, kind, host, _, port = address.split("/")
        self.address = address
        self.local = host == "localhost" or (kind in ("ip4", "ip6") and ipaddress.ip_address(host).is_loopback)
        self.name = f"the IPFS daemon at {address}"
        self._url = f"http://{f'[{host}]' if kind == 'ip6' else host}:{port}/api/v0"
        self._health = health
        self._block_seconds = block_seconds
        self._call_seconds = call_seconds
        self._margin_seconds = margin_seconds
        self._check_seconds = check_seconds
        self._client = http_client()
        self._fit = False  # the daemon told a version that we can talk to
        self._lies = ""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look now and then whether the daemon is well, until cancelled."""
        task_status.started()
        try:
            while True:
                await self.check()
                await trio.sleep(self._check_seconds)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await self._client.aclose()

    async def check(self) -> bool:
        """Whether the daemon can be used; the health of the node says why not."""
        try:
            await self.version()
        except (SourceFailed, DaemonRefused):
            return False
        return True

    # ------------------------------------------------------------ what the daemon is asked

    async def version(self) -> str:
        """The daemon's version, one that we can talk to."""
        self._fit = False
        text = _text(await self._json("version"), "Version")
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
        await self._be_fit()
        answer = await self._json("id")
        text = _text(answer, "ID")
        if not text.isalnum() or not text.isascii() or not 40 <= len(text) <= 64:
            raise self._failed(f"it says that its peer id is {text[:60]!r}")
        addresses = _dialable(answer.get("Addresses"), text)
        if not addresses:  # js-ipfs names them here alone
            addresses = _dialable((await self._json("swarm/addrs/local")).get("Strings"), text)
        self._well()
        return PeerId(text), addresses

    async def block(self, cid: Cid) -> bytes:
        """What the daemon gives under this CID, not verified. Raises ContentUnavailable besides."""
        await self._be_fit()
        seconds = self._block_seconds
        reply = await self._post(
            "block/get",
            {"arg": cid, "timeout": _duration(seconds)},
            limit_bytes=MAX_BLOCK_BYTES,
            seconds=seconds + self._margin_seconds,
        )
        try:
            self._accept(reply)
        except DaemonRefused as error:
            if _ABSENT.search(str(error)):
                raise ContentUnavailable(f"{self.name} does not have {cid}", cid=cid) from error
            raise self._failed(f"it can't read blocks: {error}") from error
        self._well()
        return reply.body

    async def tree(self, root: Cid, size: int, take: Take) -> None:
        """Hand over the blocks of a file while the daemon exports it. See the port."""
        await self._be_fit()
        seconds = self._block_seconds + self._margin_seconds
        begin = min(seconds, BEGIN_SECONDS)
        try:
            async with AsyncExitStack() as stack:
                with trio.fail_after(begin):
                    answer = await stack.enter_async_context(
                        opened(
                            self._client,
                            "POST",
                            f"{self._url}/dag/export",
                            params={"arg": root, "progress": "false"},
                        )
                    )
                if answer.status != 200:
                    with trio.fail_after(begin):
                        self._accept(Reply(answer.status, await answer.whole(MAX_JSON_BYTES)))
                await take_tree(self.name, answer, root, size, take, seconds)
        except (HttpTrouble, trio.TooSlowError, DaemonRefused, SourceFailed) as error:
            # It may be looking for blocks that it lacks, so that this is no reason for alarm.
            why = str(error) or f"nothing came for {begin:g} s"
            raise ContentUnavailable(f"{self.name} does not export {root}: {why}", cid=root) from error
        self._well()

    async def add(self, source: Path, *, pin: bool = True) -> Cid:
        """Give the daemon a copy of a file. Returns its CID, which is computed here while it is sent.

        Raises SourceFailed also when the daemon made another CID, ModelError when the file can't be read.
        """
        await self._be_fit()
        builder = Builder()
        try:
            file = await trio.to_thread.run_sync(source.open, "rb")
        except OSError as error:
            raise ModelError(f"can't read {source}: {error.strerror or error}") from error
        with file:
            size = os.fstat(file.fileno()).st_size
            reply = await self._post(
                "add",
                {
                    "cid-version": "1",
                    "raw-leaves": "true",
                    "chunker": f"size-{CHUNK_BYTES}",
                    "cid-base": "base32",
                    "pin": "true" if pin else "false",
                    "progress": "false",
                },
                seconds=self._call_seconds + size / ADD_BYTES_PER_SECOND,
                upload=_hashed(source, file, builder),
            )
        ours = builder.finish().root
        lines = self._accept(reply).splitlines()
        theirs = self._cid(_text(self._parse(lines[-1] if lines else b""), "Hash"))
        if theirs != ours:
            raise self._failed(f"it made {theirs} of {source.name}, which is {ours}")
        self._well()
        return ours

    async def put(self, block: bytes, cid: Cid) -> None:
        """Give the daemon a block of its own, one of dag-cbor. It is not pinned.

        Raises SourceFailed also when the daemon made another CID.
        """
        if cid_codec(cid) != DAG_CBOR:
            raise LocalProtocolError(f"{cid} is no block of dag-cbor")
        await self._be_fit()
        theirs, refusal = "", None
        for spelling in _DAG_CBOR:
            reply = await self._post(
                "block/put",
                {**spelling, "mhtype": "sha2-256", "cid-base": "base32", "pin": "false"},
                seconds=self._call_seconds,
                upload=_once(block),
            )
            try:
                theirs = _text(self._parse(self._accept(reply)), "Key")
            except DaemonRefused as error:
                refusal = error
                continue
            if self._cid(theirs) == cid:
                self._well()
                return
        if not theirs and refusal is not None:
            raise refusal
        raise self._failed(f"it made {theirs[:80]} of the block {cid}")

    async def pinned(self, cid: Cid, *, recursive: bool = True) -> bool:
        """Whether the daemon keeps a whole file; not `recursive`: this block, whatever happens to others."""
        await self._be_fit()
        for kind in ("recursive",) if recursive else ("recursive", "direct"):
            try:
                answer = await self._json("pin/ls", {"arg": cid, "type": kind})
            except DaemonRefused as error:
                if not _NOT_PINNED.search(str(error)):
                    raise
                continue
            keys = answer.get("Keys")
            if not isinstance(keys, dict) or [self._cid(key) for key in keys] != [cid]:
                raise self._failed(f"it was asked whether it pins {cid} and speaks of something else")
            self._well()
            return True
        self._well()
        return False

    async def pin(self, cid: Cid, *, recursive: bool = True, seconds: float = PIN_SECONDS) -> None:
        """Have the daemon keep a whole file, fetching what it lacks, for `seconds` at most.

        Not `recursive`: one block alone, for a manifest, whose links lead to more than anybody may have.
        """
        await self._be_fit()
        params = {"arg": cid, "recursive": "true" if recursive else "false", "timeout": _duration(seconds)}
        answer = await self._json("pin/add", params, seconds=seconds)
        pins = answer.get("Pins")
        if not isinstance(pins, list) or cid not in [self._cid(item) for item in pins if isinstance(item, str)]:
            raise self._failed(f"it was to pin {cid} and says that it pinned something else")
        self._well()

    async def unpin(self, cid: Cid) -> None:
        """Let the daemon forget a file or block; nothing happens when it is not pinned."""
        await self._be_fit()
        try:
            await self._json("pin/rm", {"arg": cid})
        except DaemonRefused as error:
            if not _NOT_PINNED.search(str(error)):
                raise
        self._well()

    async def connect(self, address: str) -> None:
        """Have the daemon dial a peer, /ip4/192.0.2.1/tcp/4331/p2p/12D3KooW…"""
        await self._be_fit()
        await self._json("swarm/connect", {"arg": address, "timeout": _duration(self._call_seconds)})
        self._well()

    def lied(self, cid: Cid) -> None:
        self._lies = f"it gave bytes that are not the block {cid}, so it is not asked for blocks until the next start"
        self._health.set("ipfs-daemon", address=self.address, reason=self._lies)

    # ------------------------------------------------------------ one call

    async def _be_fit(self) -> None:
        if not self._fit:
            await self.version()

    def _well(self) -> None:
        if not self._lies:
            self._health.clear("ipfs-daemon")

    def _failed(self, reason: str) -> SourceFailed:
        self._health.set("ipfs-daemon", address=self.address, reason=self._lies or reason)
        return SourceFailed(reason)

    async def _json(
        self, call: str, params: Mapping[str, str] | None = None, *, seconds: float | None = None
    ) -> dict[str, object]:
        limit = (self._call_seconds if seconds is None else seconds) + self._margin_seconds
        reply = await self._post(call, params or {}, seconds=limit)
        return self._parse(self._accept(reply))

    async def _post(
        self,
        call: str,
        params: Mapping[str, str],
        *,
        seconds: float,
        limit_bytes: int = MAX_JSON_BYTES,
        upload: AsyncIterable[bytes] | None = None,
    ) -> Reply:
        boundary = secrets.token_hex(16)
        try:
            return await ask(
                self._client,
                "POST",
                f"{self._url}/{call}",
                params=params,
                limit_bytes=limit_bytes,
                seconds=seconds,
                headers=None if upload is None else {"Content-Type": f"multipart/form-data; boundary={boundary}"},
                content=None if upload is None else _multipart(upload, boundary),
            )
        except HttpTrouble as error:
            raise self._failed(str(error)) from error

    def _accept(self, reply: Reply) -> bytes:
        """The body of a success. Raises DaemonRefused with the daemon's words, SourceFailed without any."""
        if reply.status == 200:
            return reply.body
        try:
            answer = json.loads(reply.body)
        except (ValueError, RecursionError):
            answer = None
        message = answer.get("Message") if isinstance(answer, dict) else None
        if not isinstance(message, str):
            raise self._failed(f"it answers with HTTP {reply.status} and no word why")
        raise DaemonRefused(f"{self.name} says: {_printable(message)}")

    def _parse(self, body: bytes) -> dict[str, object]:
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self._failed("its answer is not JSON, so another program may use that address") from error
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


def _text(answer: Mapping[str, object], key: str) -> str:
    value = answer.get(key)
    return value if isinstance(value, str) else ""


def _printable(message: str) -> str:
    return "".join(c if c.isprintable() else " " for c in message[:200])


def _duration(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


def _dialable(listed: object, peer: str) -> tuple[str, ...]:
    """Those of the daemon's addresses that we can dial; it lists others for QUIC, WebSockets and relays."""
    found: list[str] = []
    for item in listed if isinstance(listed, list) else ():
        try:
            address = parse_address(item if isinstance(item, str) else "")
        except RemoteProtocolError:
            continue
        if address.peer in ("", peer) and address.port:
            found.append(str(replace(address, peer=peer)))
    return tuple(dict.fromkeys(found))[:MAX_ADDRESSES]


async def _multipart(body: AsyncIterable[bytes], boundary: str) -> AsyncIterator[bytes]:
    """A body as one part of a form (RFC 7578)."""
    yield (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{boundary}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode("ascii")
    async for piece in body:
        yield piece
    yield f"\r\n--{boundary}--\r\n".encode("ascii")


async def _once(block: bytes) -> AsyncIterator[bytes]:
    yield block


async def _hashed(source: Path, file: IO[bytes], builder: Builder) -> AsyncIterator[bytes]:
    """A file piece by piece, hashed on its way."""
    while True:
        try:
            piece = await trio.to_thread.run_sync(file.read, _PIECE_BYTES)
        except OSError as error:
            raise ModelError(f"can't read {source}: {error.strerror or error}") from error
        if not piece:
            break
        await trio.to_thread.run_sync(builder.update, piece)
        yield piece
