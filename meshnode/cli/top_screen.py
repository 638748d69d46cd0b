"""The screen of `meshnode top`. Textual runs on asyncio, so it is a client of the node like any other program."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from rich.text import Text
from textual.app import App, ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import DataTable, Footer, Static

from meshnode.api.messages import PeerStatus, Status
from meshnode.cli.learn import learning_line
from meshnode.cli.status import does, where
from meshnode.core.printable import printable
from meshnode.core.sizes import counted, format_size
from protocols.errors import MeshError
from protocols.ids import short

EVERY_S: Final = 1.0
BAR: Final = 24  # characters for all layers
COLUMNS: Final = ("node", "does", "layers", "way", "sessions", "a token", "gives")


class Top(App[None]):
    """Asks `look` once a second, in a thread, for it blocks."""

    CSS = "#nodes { height: auto; } Static { padding: 0 1; } #health { color: $warning; }"
    BINDINGS: ClassVar = [("q", "quit", "Leave"), ("space", "hold", "Hold still")]
    TITLE = "meshnode"

    def __init__(self, look: Callable[[], Status]) -> None:
        """`look`: the status of the node now. Raises MeshError."""
        super().__init__()
        self._look = look
        self._held = False
        self._asking = False

    def compose(self) -> ComposeResult:
        """See App."""
        with VerticalScroll():
            yield Static(id="head")
            yield DataTable(id="nodes", cursor_type="none", zebra_stripes=True)
            yield Static(id="figures")
            yield Static(id="health")
        yield Footer()

    def on_mount(self) -> None:
        """See App."""
        self.query_one("#nodes", DataTable).add_columns(*COLUMNS)
        self.set_interval(EVERY_S, self._refresh)
        self._refresh()

    def action_hold(self) -> None:
        """Stop changing, so that it can be read and copied; go on."""
        self._held = not self._held
        self._refresh()

    def _refresh(self) -> None:
        if not self._held and not self._asking:  # a node that is slow is not asked again meanwhile
            self._asking = True
            self.run_worker(self._ask, thread=True)

    def _ask(self) -> None:
        try:
            status = self._look()
        except MeshError as error:
            self.call_from_thread(self._say, str(error))
        else:
            self.call_from_thread(self.show, status)

    def _say(self, sentence: str) -> None:
        self._asking = False
        self.query_one("#head", Static).update(Text(printable(sentence), style="bold red"))

    def show(self, status: Status) -> None:
        """Fill the screen."""
        self._asking = False
        self.query_one("#head", Static).update(_head(status))
        table = self.query_one("#nodes", DataTable)
        table.clear()
        layers = status.model.layers if status.model else 0
        for row in (status.me, *status.peers):
            table.add_row(*_row(row, layers, me=row.peer == status.peer))
        self.query_one("#figures", Static).update(Text(_figures(status)))
        self.query_one("#health", Static).update(Text(_health(status)))


def _head(status: Status) -> Text:
    model = status.model
    served = "no model" if model is None else f"{model.name} {model.version} {model.variant}"
    text = Text(printable(f"network {status.network}   {served}\n"))
    sentence = printable(("ready: " if status.ready else "not ready: ") + status.readiness)
    return text.append(sentence, style="green" if status.ready else "bold yellow")


def _row(row: PeerStatus, layers: int, *, me: bool) -> tuple[Text, ...]:
    held = 0 if row.first is None or row.last is None else row.last - row.first
    cells = (
        f"{row.name or short(row.peer)}{' (this node)' if me else ''}",
        does(row),
        bar_of(row.first, row.last, layers),
        "" if me else where(row),
        str(row.sessions or ""),
        f"{held * row.layer_decode_us / 1000:.1f} ms" if held and row.layer_decode_us else "",
        format_size(row.memory_bytes) if row.memory_bytes else "",
    )
    style = "" if me or row.connected else "red"
    return tuple(Text(printable(cell), style=style) for cell in cells)


def bar_of(first: int | None, last: int | None, layers: int) -> str:
    """Which of all layers somebody holds, as a bar."""
    if first is None or last is None or layers <= 0:
        return ""
    begin, end = first * BAR // layers, -(-last * BAR // layers)
    return "·" * begin + "█" * (end - begin) + "·" * (BAR - end)


def _figures(status: Status) -> str:
    content = status.content
    engine = f", engine {format_size(status.engine.rss_bytes)}" if status.engine else ""
    used, quota = format_size(content.used_bytes), format_size(content.quota_bytes)
    fetched, given = format_size(content.fetched_bytes), format_size(content.served_bytes)
    lines = [
        f"{counted(status.sessions, 'answer')} asked from here; node {format_size(status.rss_bytes)}{engine}",
        f"files: {used} of {quota}, fetched {fetched}, given {given}",
    ]
    if copies := status.copies:
        lines.append(f"copies: {copies.fewest} or more of every file, {copies.wanted} wanted on {copies.nodes} nodes")
    if progress := status.progress:
        share = 100 * progress.bytes_done // max(1, progress.bytes_total)
        lines.append(f"{progress.phase} layers {progress.span.first}-{progress.span.last - 1}: {share} %")
    if status.learning.lesson:
        lines.append(f"learning: {learning_line(status.learning)}")
    return printable("\n".join(lines), keep="\n")


def _health(status: Status) -> str:
    found = [f"{one.severity}: {one.text}" for one in status.health]
    found += [f"{peer.name or short(peer.peer)} says: {peer.trouble}" for peer in status.peers if peer.trouble]
    return printable("\n".join(found), keep="\n")
