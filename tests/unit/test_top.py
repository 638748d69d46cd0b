"""`meshnode top` without a terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from meshnode.api.messages import EngineStatus, HealthStatus, PeerStatus, ServedModel, Status
from meshnode.core.errors import NotRunning

pytest.importorskip("textual", reason="needs Textual: pip install '.[top]'")

from textual.widgets import DataTable, Static

from meshnode.cli.top_screen import Top, bar_of

ME = PeerStatus(peer="12D3KooWkitchen", name="kitchen", state="serving", first=0, last=12, layer_decode_us=500)
STATUS = Status(
    peer=ME.peer,
    network="home",
    readiness="nobody serves layers 12-23",
    model=ServedModel(name="small", version="v1", variant="int4", layers=24),
    me=ME,
    peers=(PeerStatus(peer="12D3KooWlaptop", name="lap\x1b[31mtop", age_s=3.0),),
    engine=EngineStatus(rss_bytes=5_000_000),
    health=(HealthStatus(severity="high", text="[bold]disk[/bold] is full"),),
)


def text_of(app: Top, id: str) -> str:
    return str(app.query_one(f"#{id}", Static).render())


class Watched(Top):
    """Tells when it has drawn."""

    def __init__(self, look: Callable[[], Status]) -> None:
        super().__init__(look)
        self.drawn = asyncio.Event()

    def show(self, status: Status) -> None:
        super().show(status)
        self.drawn.set()

    def _say(self, sentence: str) -> None:
        super()._say(sentence)
        self.drawn.set()

    async def until(self, words: str) -> None:
        """Until these words stand on top; it looks once a second."""
        async with asyncio.timeout(60):
            while words not in text_of(self, "head"):
                self.drawn.clear()
                await self.drawn.wait()


def test_it_shows_the_mesh_and_says_when_the_node_is_gone() -> None:
    told: list[Status | NotRunning] = [STATUS]

    def look() -> Status:
        if isinstance(told[-1], NotRunning):
            raise told[-1]
        return told[-1]

    async def watch() -> None:
        app = Watched(look)
        async with app.run_test(size=(140, 40)) as pilot:
            await app.until("nobody serves")
            assert "not ready: nobody serves layers 12-23" in text_of(app, "head")
            rows = [[str(cell) for cell in app.query_one(DataTable).get_row_at(index)] for index in range(2)]
            assert rows[0][:3] == ["kitchen (this node)", "serving layers 0-11", "█" * 12 + "·" * 12]
            assert rows[0][5] == "6.0 ms"
            assert "\x1b" not in rows[1][0]
            assert rows[1][3] == "not connected, last heard of 3 s ago"
            assert "high: [bold]disk[/bold] is full" in text_of(app, "health")
            told.append(replace(STATUS, ready=True, readiness="a probe token passed"))
            await app.until("ready: a probe token passed")
            told.append(NotRunning("no node runs in this folder"))
            await app.until("no node runs in this folder")
            told.append(STATUS)
            await app.until("nobody serves")
            await pilot.press("q")

    asyncio.run(watch())


@pytest.mark.parametrize(
    ("first", "last", "layers", "bar"),
    [
        (0, 24, 24, "█" * 24),
        (12, 24, 24, "·" * 12 + "█" * 12),
        (0, 1, 48, "█" + "·" * 23),
        (47, 48, 48, "·" * 23 + "█"),
        (None, None, 24, ""),
        (0, 1, 0, ""),
    ],
)
def test_a_bar_is_as_long_as_all_layers(first: int | None, last: int | None, layers: int, bar: str) -> None:
    assert bar_of(first, last, layers) == bar
