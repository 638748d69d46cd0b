"""A trustless HTTP gateway as a source of blocks (specs.ipfs.tech/http-gateways/trustless-gateway).

A file is asked for as one CAR; a gateway that does not make them is asked for its blocks one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Final

import trio

from meshnode.core.errors import ContentUnavailable
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.ipfs.car_tree import BEGIN_S, CONTENT_TYPE, UnusableCar, take_tree
from meshnode.ipfs.http import MAX_REDIRECTS, Answer, HttpTrouble, ask, http_client, opened
from meshnode.ipfs.source_order import OnBlock, SourceFailed
from protocols.bitswap.messages import MAX_BLOCK_BYTES
from protocols.ids import Cid, short

BLOCK_S: Final = 15.0  # a gateway may have to find the block itself
_OK: Final = 200
_NOT_THERE: Final = (400, 404, 410, 412, 451, 504)  # about this block; any other status is about the gateway
_NO_CARS: Final = (406, 415, 501)  # it is well and does not make them
_RAW: Final = {"Accept": "application/vnd.ipld.raw"}
_CAR: Final = {"Accept": f"{CONTENT_TYPE}; version=1; order=dfs; dups=n"}

_log = get_logger("gateway")


class Gateway:
    """Fetches raw blocks and CAR files by HTTP GET. Implements the port `Source`."""

    def __init__(self, url: str, health: Health, *, seconds: float = BLOCK_S) -> None:
        """
        Args:
          url: the part before /ipfs/, as in the setting content.gateways.
          seconds: for one block.
        """
        self.name = url.rstrip("/")
        self._health = health
        self._seconds = seconds
        self._client = http_client()
        self._no_cars = ""  # why it is not asked for them any more

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep connections open until cancelled."""
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await self._client.aclose()

    async def block(self, cid: Cid) -> bytes:
        """What the gateway gives under this CID, not verified. Raises ContentUnavailable, SourceFailed."""
        with self._in_health():
            try:
                reply = await ask(
                    self._client,
                    "GET",
                    f"{self.name}/ipfs/{cid}",
                    params={"format": "raw"},
                    headers=_RAW,
                    limit_bytes=MAX_BLOCK_BYTES,
                    seconds=self._seconds,
                    redirects=MAX_REDIRECTS,
                )
            except HttpTrouble as error:
                raise SourceFailed(str(error), cid=cid) from error
            self._check(reply.status, cid)
        self._answers()
        return reply.body

    async def tree(self, root: Cid, size: int, on_block: OnBlock) -> None:
        """Hand over the blocks of a file while its CAR comes in. See the port."""
        if self._no_cars:
            raise ContentUnavailable(f"{self.name} gives no CAR files: {self._no_cars}", cid=root)
        try:
            async with AsyncExitStack() as stack:
                stack.enter_context(self._in_health())
                answer = await self._open_car(stack, root)
                if answer.status in _NO_CARS:
                    raise UnusableCar(f"it answers with HTTP {answer.status} to a wish for one", cid=root)
                self._check(answer.status, root)
                if answer.content_type.partition(";")[0].strip().lower() != CONTENT_TYPE:
                    raise UnusableCar(f"it answers with {answer.content_type[:60]!r} to a wish for one", cid=root)
                await take_tree(self.name, answer, root, size, on_block, self._seconds)
        except UnusableCar as error:
            self._no_cars = str(error)
            _log.info("gateway.without_cars", gateway=self.name, reason=self._no_cars)
            raise
        self._answers()

    async def _open_car(self, stack: AsyncExitStack, root: Cid) -> Answer:
        try:
            with trio.fail_after(min(self._seconds, BEGIN_S)):
                return await stack.enter_async_context(
                    opened(
                        self._client,
                        "GET",
                        f"{self.name}/ipfs/{root}",
                        params={"format": "car", "dag-scope": "entity"},
                        headers=_CAR,
                        redirects=MAX_REDIRECTS,
                    )
                )
        except trio.TooSlowError:
            raise ContentUnavailable(f"{self.name} does not begin with a CAR file of {root}", cid=root) from None
        except HttpTrouble as error:
            raise SourceFailed(str(error), cid=root) from error

    def _check(self, status: int, cid: Cid) -> None:
        if status in _NOT_THERE:
            self._answers()
            raise ContentUnavailable(f"{self.name} does not have {cid} (HTTP {status})", cid=cid)
        if status != _OK:
            raise SourceFailed(f"it answers with HTTP {status}", cid=cid)

    @contextmanager
    def _in_health(self) -> Iterator[None]:
        """The health says why the gateway can't be used, until it answers."""
        try:
            yield
        except SourceFailed as error:
            self._health.set("gateway-unusable", gateway=self.name, reason=str(error))
            raise

    def _answers(self) -> None:
        self._health.clear("gateway-unusable", gateway=self.name)

    def sent_bad_data(self, cid: Cid) -> None:
        """See the port."""
        self._answers()
        self._health.set("bad-gateway", gateway=self.name, cid=short(cid))
