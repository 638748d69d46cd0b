"""One HTTP request whose answer is bounded in bytes and in time, whatever the server does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import httpx
import trio

from meshnode.core.config import format_size
from meshnode.core.errors import TransientError

MAX_REDIRECTS: Final = 3
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_IDENTITY: Final = {"Accept-Encoding": "identity"}  # a compressed answer could grow beyond every limit


class HttpTrouble(TransientError):
    """There is no usable answer. The text is a clause: "it can't be reached (Connection refused)"."""


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes


def http_client() -> httpx.AsyncClient:
    """A client that keeps connections open. It takes no proxy and no password from its surroundings."""
    return httpx.AsyncClient(trust_env=False, timeout=None, follow_redirects=False, headers=_IDENTITY)


async def ask(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    *,
    limit_bytes: int,
    seconds: float,
    params: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    content: AsyncIterator[bytes] | None = None,
    redirects: int = 0,
) -> Reply:
    """Send one request and read its answer.

    Args:
      limit_bytes: of the body; more is an error, and is not read.
      seconds: for all of it, redirects included.
      redirects: how many are followed; only to the same scheme.

    Raises HttpTrouble. If cancelled: the connection is closed.
    """
    target = httpx.URL(url, params=params)
    try:
        with trio.fail_after(seconds):
            for _ in range(redirects + 1):
                async with _answer(client, method, target, headers, content) as response:
                    if redirects and response.status_code in _REDIRECTS:
                        target = _next(target, response)
                        continue
                    return Reply(response.status_code, await _body(response, limit_bytes))
    except trio.TooSlowError:
        raise HttpTrouble(f"it did not answer within {seconds:g} s") from None
    except httpx.ConnectError as error:
        raise HttpTrouble(f"it can't be reached ({error})") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise HttpTrouble(f"its answer broke off or is no HTTP ({error or type(error).__name__})") from error
    raise HttpTrouble(f"it redirects more than {redirects} times")


@asynccontextmanager
async def _answer(
    client: httpx.AsyncClient,
    method: str,
    url: httpx.URL,
    headers: Mapping[str, str] | None,
    content: AsyncIterator[bytes] | None,
) -> AsyncIterator[httpx.Response]:
    response = await client.send(client.build_request(method, url, headers=headers, content=content), stream=True)
    try:
        yield response
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await response.aclose()


def _next(url: httpx.URL, response: httpx.Response) -> httpx.URL:
    target = url.join(response.headers.get("Location", ""))
    if target.scheme != url.scheme or not target.host:
        raise HttpTrouble(f"it redirects from {url.scheme} to {str(target)[:120]!r}; only {url.scheme} is followed")
    return target


async def _body(response: httpx.Response, limit: int) -> bytes:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise HttpTrouble(f"it answers in the encoding {encoding[:40]!r}, which was not asked for")
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > limit:
            raise HttpTrouble(f"it answers with more than {format_size(limit)}")
    return bytes(body)
