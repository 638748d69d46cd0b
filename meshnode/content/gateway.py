"""A trustless HTTP gateway as a source of blocks (specs.ipfs.tech/http-gateways/trustless-gateway)."""

from __future__ import annotations

from typing import Final

import trio

from meshnode.content.http_reply import MAX_REDIRECTS, HttpTrouble, ask, http_client
from meshnode.content.outside import SourceFailed
from meshnode.core.errors import ContentUnavailable
from meshnode.core.health import Health
from protocols.bitswap.messages import MAX_BLOCK_BYTES
from protocols.ids import Cid, short

BLOCK_SECONDS: Final = 15.0  # a gateway may have to find the block itself
_OK: Final = 200
_NOT_THERE: Final = (400, 404, 410, 412, 451, 504)  # about this block; any other status is about the gateway
_RAW: Final = {"Accept": "application/vnd.ipld.raw"}


class Gateway:
    """Fetches raw blocks by HTTP GET. Implements the port `Source`."""

    def __init__(self, url: str, health: Health, *, seconds: float = BLOCK_SECONDS) -> None:
        """
        Args:
          url: the part before /ipfs/, as in the setting content.gateways.
          seconds: for one block.
        """
        self.name = url.rstrip("/")
        self._health = health
        self._seconds = seconds
        self._client = http_client()

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
        if reply.status in _NOT_THERE:
            raise ContentUnavailable(f"{self.name} does not have {cid} (HTTP {reply.status})", cid=cid)
        if reply.status != _OK:
            raise SourceFailed(f"it answers with HTTP {reply.status}", cid=cid)
        return reply.body

    def lied(self, cid: Cid) -> None:
        self._health.set("gateway-lied", gateway=self.name, cid=short(cid))
