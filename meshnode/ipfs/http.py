"""One HTTP request whose answer is bounded in bytes and in time, whatever the server does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import httpx
import trio

from meshnode.core.errors import TransientError
from meshnode.core.printable import one_line
from meshnode.core.sizes import format_size

MAX_REDIRECTS: Final = 3
MAX_WORDS: Final = 160  # characters of an error that are shown
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_IDENTITY: Final = {"Accept-Encoding": "identity"}  # a compressed answer could grow beyond every limit


class HttpTrouble(TransientError):
    """There is no usable answer. The text is a clause: "it can't be reached (Connection refused)"."""


class Refusal(TransientError):
    """Whoever was asked is well and says no. The text holds its words."""


class Body(Protocol):
    """An answer that is still coming in."""

    async def receive(self) -> bytes:
        """The next bytes; b"" at the end. Raises HttpTrouble. If cancelled: it can't be used any more."""


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes


class Answer:
    """An answer that is still coming in."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.content_type: str = response.headers.get("Content-Type", "")
        self._encoding: str = response.headers.get("Content-Encoding", "identity")
        self._pieces = response.aiter_raw()

    async def receive(self) -> bytes:
        """The next bytes of its body, about 64 KiB at most; b"" at its end.

        Raises HttpTrouble. If cancelled: the answer can't be used any more.
        """
        if self._encoding != "identity":
            raise HttpTrouble(f"it answers in the encoding {self._encoding[:40]!r}, which was not asked for")
        with _in_words():
            return await anext(self._pieces, b"")

    async def whole(self, limit_bytes: int) -> bytes:
        """All of its body. Raises HttpTrouble, also when it is longer."""
        body = bytearray()
        while piece := await self.receive():
            body += piece
            if len(body) > limit_bytes:
                raise HttpTrouble(f"it answers with more than {format_size(limit_bytes)}")
        return bytes(body)


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
      redirects: see `opened`.

    Raises HttpTrouble. If cancelled: the connection is closed.
    """
    try:
        with trio.fail_after(seconds):
            async with opened(
                client, method, url, params=params, headers=headers, content=content, redirects=redirects
            ) as answer:
                return Reply(answer.status, await answer.whole(limit_bytes))
    except trio.TooSlowError:
        raise HttpTrouble(f"it did not answer within {seconds:g} s") from None


@asynccontextmanager
async def opened(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    *,
    params: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    content: AsyncIterator[bytes] | None = None,
    redirects: int = 0,
) -> AsyncIterator[Answer]:
    """Send one request; its answer, once its head is here. The caller limits the time.

    Args:
      redirects: how many are followed; only with the same scheme, and to the same host or one below it
        (a gateway may serve every CID from a name of its own).

    Raises HttpTrouble. If cancelled: the connection is closed.
    """
    with _in_words():
        target = httpx.URL(url, params=params)
    for _ in range(redirects + 1):
        with _in_words():
            request = client.build_request(method, target, headers=headers, content=content)
            response = await client.send(request, stream=True)
        try:
            if redirects and response.status_code in _REDIRECTS:
                with _in_words():
                    target = _next(target, response)
                continue
            yield Answer(response)
            return
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await response.aclose()
    raise HttpTrouble(f"it redirects more than {redirects} times")


@contextmanager
def _in_words() -> Iterator[None]:
    """What the library raises, as a clause for a person."""
    try:
        yield
    except httpx.ConnectError as error:
        raise HttpTrouble(f"it can't be reached ({clip(error)})") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise HttpTrouble(f"its answer broke off or is no HTTP ({clip(error) or type(error).__name__})") from error


def clip(words: object) -> str:
    """What an error says, for people; a library quotes what the server sent, however long that is."""
    return one_line(str(words)[:MAX_WORDS])


def _next(url: httpx.URL, response: httpx.Response) -> httpx.URL:
    target = url.join(response.headers.get("Location", ""))
    if target.scheme != url.scheme or not target.host:
        raise HttpTrouble(f"it redirects from {url.scheme} to {str(target)[:120]!r}; only {url.scheme} is followed")
    if target.host != url.host and not target.host.endswith(f".{url.host}"):
        raise HttpTrouble(f"it redirects to another host, {target.host[:120]!r}; if that is meant, name it directly")
    return target
