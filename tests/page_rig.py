"""A real browser looks at the page of a node. Where there is none, the tests say so and are skipped."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import trio

from meshnode.api.messages import (
    CopiesStatus,
    HealthStatus,
    LearningStatus,
    PeerStatus,
    ReleaseStatus,
    ServedModel,
    Status,
)
from protocols.ids import DAG_CBOR, cid_of
from tests.http_rig import FakeDoor, Served, serving

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")

Result = TypeVar("Result")

ADAPTER = cid_of(DAG_CBOR, b"an adapter")


def peer(name: str, first: int | None, last: int | None, **more: Any) -> PeerStatus:
    """A node that serves these layers."""
    state = "idle" if first is None else "serving"
    given = {"connected": True, "round_trip_ms": 1.5, "memory_bytes": 1 << 30, "state": state, **more}
    return PeerStatus(peer=f"12D3KooW{name}", name=name, first=first, last=last, **given)


STATUS = Status(
    peer="12D3KooWkitchen",
    network="home",
    ready=True,
    readiness="a probe token passed through the chain in 5 ms",
    model=ServedModel(name="small", version="v1.0.0-0", manifest="bafyreismall", variant="int4", layers=24),
    me=peer("kitchen", 0, 8, round_trip_ms=None),
    peers=(peer("laptop", 8, 16), peer("tablet", 16, 24, round_trip_ms=40.0)),
    copies=CopiesStatus(wanted=2, nodes=3, fewest=1, files=3, short=1, groups={"layer.0": 2, "layer.1": 1}),
    health=(HealthStatus(code="disk", severity="medium", text="the disk is nearly full: give content.quota less"),),
    releases=(ReleaseStatus(version="a1", adapter=ADAPTER, phase="released", in_use=True, median=-0.2),),
    learning=LearningStatus(state="training", lesson="bafy", losses=(2.0, 1.5, 1.2), rounds=4, round=2),
)


class PageDoor(FakeDoor):
    """A node that tells what a test wants it to be."""

    def __init__(self) -> None:
        super().__init__(["Hello", " **you**"])
        self.told = STATUS

    def status(self) -> Status:
        return self.told

    def tell(self, status: Status) -> None:
        """From now on."""
        self.told = status
        self.news.set()
        self.news = trio.Event()


class Node:
    """A served door in a thread of its own; the browser has the main one."""

    def __init__(self, served: Served, token: trio.lowlevel.TrioToken) -> None:
        self.url = served.url
        self.served = served
        self._token = token

    @property
    def door(self) -> PageDoor:
        assert isinstance(self.served.door, PageDoor)
        return self.served.door

    def do(self, act: Callable[[PageDoor], Result]) -> Result:
        """In its thread."""
        return trio.from_thread.run_sync(act, self.door, trio_token=self._token)

    def tell(self, **changes: Any) -> None:
        """Its status changes."""
        self.do(lambda door: door.tell(replace(door.told, **changes)))


@contextmanager
def node(*, keyed: bool = False) -> Iterator[Node]:
    """A node whose page can be opened."""
    found: list[Node] = []
    ready, done = threading.Event(), trio.Event()

    async def serve() -> None:
        async with serving(PageDoor(), keyed=keyed) as served:
            found.append(Node(served, trio.lowlevel.current_trio_token()))
            ready.set()
            await done.wait()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert ready.wait(20)
    try:
        yield found[0]
    finally:
        found[0].do(lambda _: done.set())
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium without a window. Its own sandbox needs rights that a container lacks; what it opens is ours."""
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield chromium
        finally:
            chromium.close()


class Window:
    """A page in it. What goes wrong there, and every host that it asks, is noted."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.asked: list[str] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def strangers(self, url: str) -> list[str]:
        """What was asked of others."""
        return [asked for asked in self.asked if not asked.startswith(f"{url}/")]


@contextmanager
def window(chromium: Any, url: str, **options: Any) -> Iterator[Window]:
    """The page, opened; when the test is through, nothing has gone wrong in it, and nobody else was asked."""
    context = chromium.new_context(**options)
    try:
        opened = Window(context.new_page())
        opened.page.goto(url)
        yield opened
        assert opened.complaints == []
        assert opened.strangers(url) == []
    finally:
        context.close()
