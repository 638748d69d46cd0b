"""ipfshttpclient within bounds: every call has a limit of bytes, a deadline for all of it, and can be abandoned.

The library reads an answer of any size into memory (400 MB for one "block"), adds a time-out for the connection to
one for every read (6 s with a time-out of 1 s, and no end while a byte comes now and then), follows redirects, takes
proxies from the environment and blocks its thread. So a transport of ours lies under its session of `requests`, and
each call runs in a thread with a connection of its own: when its time is over nobody waits for the thread any more,
and its socket is shut down, which ends it.

This file alone imports the library, which is an optional extra.
"""

from __future__ import annotations

import functools
import socket
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from http.client import HTTPException
from typing import Any, Final, TypeVar

import ipfshttpclient
import trio
import urllib3
from ipfshttpclient import exceptions, http_requests, requests_wrapper

from meshnode.core.errors import ConfigError
from meshnode.core.sizes import format_size
from meshnode.ipfs.http import HttpTrouble, Refusal, clip
from protocols.errors import MeshError

MAX_THREADS: Final = 12  # calls at the same time, abandoned ones that have not ended among them
CHUNK_BYTES: Final = 1 << 18  # written to the socket in one go
PIECE_BYTES: Final = 1 << 18  # of an answer, read at once

# The library passes an argument that urllib3 2 ignores; urllib3 3, which it does not work with, is excluded.
warnings.filterwarnings("ignore", "The 'strict' parameter", FutureWarning)

Result = TypeVar("Result")


class _Call:
    """One request to the daemon and its answer. Used by its thread, ended by the event loop."""

    def __init__(self, limit_bytes: int | None) -> None:
        """`limit_bytes`: of the body, which is read whole; None: read piece by piece, and its reader counts."""
        self.limit_bytes = limit_bytes
        self.ended = False
        self.connected = False
        self._socket: socket.socket | None = None

    def opened(self, connection: socket.socket) -> None:
        self._socket, self.connected = connection, True
        if self.ended:
            self.end()

    def end(self) -> None:
        """Whatever the thread waits for at the socket breaks off now."""
        self.ended = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


class _Connection(requests_wrapper.HTTPConnection):  # type: ignore[misc]
    def __init__(self, call: _Call, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._call = call

    def _new_conn(self) -> socket.socket:
        connection: socket.socket = super()._new_conn()
        self._call.opened(connection)
        return connection


class _Body:
    """An answer's body, within the limit of its call: as much of urllib3's response as `requests` needs."""

    def __init__(self, raw: Any, call: _Call) -> None:
        self._raw = raw
        self._call = call
        self.close: Callable[[], None] = raw.close
        self.release_conn: Callable[[], None] = raw.release_conn

    def stream(self, _amount: int | None = None, decode_content: bool | None = None) -> Iterator[bytes]:
        encoding = self._raw.headers.get("Content-Encoding", "identity")
        if encoding != "identity":  # it could grow beyond every limit
            raise HttpTrouble(f"it answers in the encoding {clip(encoding)!r}, which was not asked for")
        limit = self._call.limit_bytes
        if limit is None:
            while piece := self._read():
                yield piece
            return
        body = bytearray()
        while piece := self._read():
            body += piece
            if len(body) > limit:
                raise HttpTrouble(f"it answers with more than {format_size(limit)}")
        yield bytes(body)  # in one piece: the library parses JSON anew with each

    def _read(self) -> bytes:
        piece: bytes = self._raw.read1(PIECE_BYTES, decode_content=False)
        return piece


class _Transport(requests_wrapper.HTTPAdapter):  # type: ignore[misc]
    def __init__(self, call: _Call) -> None:
        self._call = call
        super().__init__(pool_connections=1, pool_maxsize=1)

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        pool.ConnectionCls = functools.partial(_Connection, self._call)
        return pool

    def send(self, *args: Any, **kwargs: Any) -> Any:
        response = super().send(*args, **kwargs)
        response.raw = _Body(response.raw, self._call)
        if response.status_code != 200 and response.status_code < 400:  # nothing is redirected
            response.close()
            raise HttpTrouble(f"it answers with HTTP {response.status_code} and no word why")
        return response


class BoundedClient:
    """Calls of one daemon's RPC. All methods raise HttpTrouble (no usable answer) and Refusal."""

    def __init__(self, address: str) -> None:
        """
        Args:
          address: multiaddr of the RPC, /ip4/127.0.0.1/tcp/5001.

        Raises ConfigError when the environment has the library use another transport.
        """
        if ipfshttpclient.http.PREFER_HTTPX or not http_requests.PATCH_REQUESTS:
            raise ConfigError(
                "content.ipfs_api can't be used while PY_IPFS_HTTP_CLIENT_PREFER_HTTPX or "
                "PY_IPFS_HTTP_CLIENT_PATCH_REQUESTS is set in the environment; unset both"
            )
        self._address = address
        self._threads = trio.CapacityLimiter(MAX_THREADS)

    async def call(self, work: Callable[[Any], Result], *, seconds: float, limit_bytes: int) -> Result:
        """What `work` returns, which makes one call of the `ipfshttpclient.Client` that it is given, in a thread.

        Args:
          seconds: for all of it, the connection included.
          limit_bytes: of the answer's body.

        If cancelled: the connection is closed, and nobody waits for the thread.
        """
        call = _Call(limit_bytes)

        def run() -> Result:
            client = self._open(call, seconds)
            with _in_words(call):
                try:
                    return work(client)
                finally:
                    client.close()

        try:
            with trio.fail_after(seconds):
                return await self._in_thread(run)
        except trio.TooSlowError:
            raise HttpTrouble(f"it did not answer within {seconds:g} s") from None
        finally:
            call.end()

    @asynccontextmanager
    async def stream(self, work: Callable[[Any], Iterator[bytes]], *, seconds: float) -> AsyncIterator[Stream]:
        """The answer of a call with `stream=True`, once its head is here: it is read piece by piece.

        Args:
          seconds: until its head is here; the reader limits the rest.

        If cancelled: the connection is closed.
        """
        call = _Call(None)

        def run() -> Stream:
            client = self._open(call, None)
            with _in_words(call):
                try:
                    return Stream(self._in_thread, call, client, work(client))
                except BaseException:
                    client.close()
                    raise

        stream: Stream | None = None
        try:
            try:
                with trio.fail_after(seconds):
                    stream = await self._in_thread(run)
            except trio.TooSlowError:
                raise HttpTrouble(f"nothing came for {seconds:g} s") from None
            yield stream
        finally:
            call.end()
            if stream is not None:
                stream.close()

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._threads)

    def _open(self, call: _Call, seconds: float | None) -> Any:
        """A client for one call. Its session is the library's own, with nothing from the environment."""
        client = ipfshttpclient.Client(
            self._address,
            session=True,
            chunk_size=CHUNK_BYTES,
            headers={"Accept-Encoding": "identity"},
            timeout=seconds,
            username=None,
            password=None,
        )
        session = client._client._session
        session.trust_env = False
        transport = _Transport(call)
        for prefix in tuple(session.adapters):
            session.mount(prefix, transport)
        return client


class Stream:
    """An answer that is still coming in."""

    def __init__(self, in_thread: Callable[..., Any], call: _Call, client: Any, pieces: Iterator[bytes]) -> None:
        self._in_thread = in_thread
        self._call = call
        self._client = client
        self._pieces = pieces
        self._reading = False

    async def receive(self) -> bytes:
        """The next bytes of its body, CHUNK_BYTES at most; b"" at its end.

        Raises HttpTrouble. If cancelled: the answer can't be used any more.
        """
        self._reading = True
        piece: bytes = await self._in_thread(self._next)
        self._reading = False
        return piece

    def _next(self) -> bytes:
        try:
            with _in_words(self._call):
                return next(self._pieces, b"")
        finally:
            if self._call.ended:
                self._close()  # nobody reads on

    def close(self) -> None:
        """After the call has ended; a thread that still reads closes it itself."""
        if not self._reading:
            self._close()

    def _close(self) -> None:
        self._pieces.close()  # type: ignore[attr-defined]
        self._client.close()


@contextmanager
def _in_words(call: _Call) -> Iterator[None]:
    """What the library and those below it raise, as a clause for a person."""
    try:
        yield
    except MeshError:
        raise
    except exceptions.ErrorResponse as error:
        words = error.args[0]
        # Without words of the daemon, the library has put its own in their place.
        if not isinstance(words, str) or words == f"{type(error.original).__name__}: {error.original}":
            raise _wordless(error) from error
        raise Refusal(clip(words)) from error
    except exceptions.StatusError as error:
        raise _wordless(error) from error
    except exceptions.TimeoutError as error:
        raise HttpTrouble("it did not answer in time") from error
    except (exceptions.CommunicationError, urllib3.exceptions.HTTPError, HTTPException, OSError) as error:
        what = "its answer broke off or is no HTTP" if call.connected else "it can't be reached"
        raise HttpTrouble(f"{what} ({clip(_root(error))})") from error
    except Exception as error:  # whatever a library says about bytes that it was not made for: too deep, two values
        raise HttpTrouble("its answer is not JSON, so another program may use that address") from error


def _wordless(error: exceptions.StatusError) -> HttpTrouble:
    status = error.original.response.status_code
    return HttpTrouble(f"it answers with HTTP {status} and no word why")


def _root(error: BaseException) -> str:
    """The innermost reason: each of the libraries wraps those below it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(error) or type(error).__name__
