"""A scripted HTTP server on loopback: every request is answered by the next scene."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Request(BaseHTTPRequestHandler):
    """One request; `body` was read, `ended` is set when the server closes."""

    body: bytes
    ended: threading.Event

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def reply(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


Scene = Callable[[Request], None]


class Site:
    """The running server; `scene` may be exchanged at any time, `paths` are the requests so far."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.paths: list[str] = []
        self.bodies: list[bytes] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def multiaddr(self) -> str:
        return f"/ip4/127.0.0.1/tcp/{self.port}"


def _read_body(request: Request) -> bytes:
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    body = b""
    while size := int(request.rfile.readline(), 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return body


@contextmanager
def site(scene: Scene) -> Iterator[Site]:
    here = Site(scene)
    ended = threading.Event()

    class Handler(Request):
        def answer(self) -> None:
            self.ended = ended
            self.body = _read_body(self)
            here.paths.append(self.path)
            here.bodies.append(self.body)
            try:
                here.scene(self)
            except OSError:
                self.close_connection = True  # the client went away, as it should in some scenes

        do_GET = do_POST = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    here.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def silence(request: Request) -> None:
    """Take the request and say nothing."""
    request.ended.wait(30)


def drip(request: Request) -> None:
    """Never silent for long, never done."""
    request.send_response(200)
    request.end_headers()
    while not request.ended.wait(0.05):
        request.wfile.write(b"x")
        request.wfile.flush()


def flood(request: Request) -> None:
    """More than anybody asked for."""
    request.send_response(200)
    request.end_headers()
    while not request.ended.is_set():
        request.wfile.write(bytes(1 << 16))


def truncate(request: Request) -> None:
    """Promise 1000 bytes and go away after ten."""
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    request.wfile.write(b"0123456789")
    request.close_connection = True


def no_http(request: Request) -> None:
    request.wfile.write(b"\x00\x01 not a status line\r\n\r\n")
    request.close_connection = True


def packed(request: Request) -> None:
    """Compressed, although that was not asked for."""
    request.reply(b"\x1f\x8b", Content_Encoding="gzip")
