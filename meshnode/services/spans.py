"""The spans that this node has open, each with an engine of its own: opened, served, retired, lost.

One of them takes new sessions. Besides it others may be open: one that stands by, those whose last sessions end.
Which layers they are is decided elsewhere (`placement.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, Protocol

import trio

from meshnode.core.errors import Declined, DiskError, EngineLost, FatalError, ModelError, TransientError
from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.core.sizes import counted, format_size
from meshnode.core.tasks import Tasks
from meshnode.engine.open_span import OpenSpan
from meshnode.engine.port import Engine, StageSpec
from meshnode.model.release import ServedRelease
from meshnode.policy.engine_restarts import HEALTHY_S, EngineRestarts
from meshnode.services.port import Content, Loading
from meshnode.store.port import StoreUsage
from protocols.advert.messages import Span
from protocols.errors import ProtocolError
from protocols.ids import Cid
from protocols.manifest.messages import FileRef
from protocols.words import layers

FETCHES_AT_ONCE: Final = 4  # files; each is fetched from several peers at once by itself
GOODBYE_S: Final = 5.0  # for ending the engines when the node stops
PINS: Final = ("span-0", "span-1", "span-2", "span-3")  # of ours; known names, so that a restart can drop them
CHANGE_SHARE: Final = 10  # a measured speed is told when it moved by one part in so many

_log = get_logger("spans")


class Files(Protocol):
    """What we need of the store (`store/port.py`)."""

    def unpin(self, name: str) -> None: ...

    def pin_only(self, name: str, cids: Collection[Cid]) -> None: ...

    def files(self) -> frozenset[Cid]: ...

    def usage(self) -> StoreUsage: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SpansSettings:
    """What this node gives to its engines."""

    incarnation: Callable[[], int]  # of the node now
    memory_bytes: int  # for weights and KV
    rng: random.Random
    kind: str = "onnx"  # of engine
    threads: int = 1  # of each engine
    max_sessions: int = 8
    kv_bytes: int = 0  # most KV of all sessions; 0: what the weights leave of memory_bytes
    retire_s: float = 120.0  # most time that sessions of an old span may take to end


class SpansService:
    """Implements `ManySpans` of services/port.py."""

    name = "spans"

    def __init__(
        self,
        content: Content,
        files: Files,
        engines: Callable[[StageSpec], Engine],
        health: Health,
        settings: SpansSettings,
    ) -> None:
        """`files`: the store that `content` fetches into. `engines` makes one for a span."""
        self._content = content
        self._files = files
        self._engines = engines
        self._health = health
        self._settings = settings
        self._changes = Changes()
        self._tasks = Tasks()
        self._open: list[OpenSpan] = []  # all that have an engine
        self._serving: OpenSpan | None = None
        self._retiring: list[OpenSpan] = []
        self._pins: dict[Span, str] = {}  # spans whose files are pinned
        self._loading: Loading | None = None
        self._restarts = EngineRestarts()
        self._average_us = self._layer_us = (0, 0)

    # What others see

    @property
    def changes(self) -> Changes:
        return self._changes

    @property
    def serving(self) -> OpenSpan | None:
        return self._serving

    @property
    def retiring(self) -> bool:
        return bool(self._retiring)

    @property
    def loading(self) -> Loading | None:
        return self._loading

    @property
    def rests_until(self) -> float:
        return self._restarts.rests_until

    @property
    def layer_us(self) -> tuple[int, int]:
        return self._layer_us

    # What is done with them

    async def open(self, release: ServedRelease, span: Span) -> OpenSpan:
        named = release.variant.files(span.first, span.last)
        files = {file.cid: file for file in named.values()}
        try:
            await self._fetch(files, span, release.title)
            while self._retiring and self._serving is None:
                await self._changes.wait()  # the old span had to go first, for its memory
            size = sum(file.size for file in files.values())
            self._show(Loading(release.title, span, "opening", len(files), len(files), size, size))
            with ExitStack() as here:
                paths = {}
                for cid, file in files.items():
                    opened = await self._content.open(file)
                    here.callback(opened.close)
                    paths[cid] = opened.path
                made = await self._start(
                    StageSpec(
                        kind=self._settings.kind,
                        graph=paths[named["graph"].cid],
                        graph_name=str(named["graph"].cid),
                        groups={name: paths[file.cid] for name, file in named.items() if name != "graph"},
                        first=span.first,
                        last=span.last,
                        architecture=release.manifest.architecture,
                        threads=self._settings.threads,
                        max_sessions=self._settings.max_sessions,
                        max_kv_bytes=self._kv_bytes(release, span),
                    ),
                    span,
                )
        except (TransientError, Declined, FatalError, ProtocolError) as error:
            _log.warning("span.failed", first=span.first, last=span.last, reason=str(error))
            if not isinstance(error, ModelError):  # which is for good, and placement says so
                words = layers(span.first, span.last)
                self._health.set("span-failed", model=release.title, layers=words, reason=str(error))
            raise
        except trio.Cancelled:
            self._unpin(span)
            raise
        finally:
            self._show(None)
        self._health.clear("span-failed")
        self._measure(made, release)
        return made

    def serve(self, opened: OpenSpan) -> None:
        before, self._serving = self._serving, opened
        _log.info("span.served", first=opened.span.first, last=opened.span.last)
        if before is not None:
            self._retire(before, self._settings.retire_s)
        self._changes.notify()

    def vacate(self) -> None:
        before, self._serving = self._serving, None
        if before is not None:
            self._retire(before, self._settings.retire_s)
            self._changes.notify()

    def discard(self, opened: OpenSpan) -> None:
        if not opened.lost:
            self._retire(opened, 0)
            self._changes.notify()

    def engine_lost(self, engine: Engine, reason: str) -> None:
        for opened in self._open:
            if opened.engine is engine:
                self._lose(opened, reason)
                return

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what is open until cancelled. Engines are ended on the way out."""
        for pin in PINS:
            self._files.unpin(pin)
        try:
            await self._tasks.run(task_status=task_status)
        finally:
            self._serving = None
            with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
                async with trio.open_nursery() as goodbye:
                    for opened in self._open:
                        goodbye.start_soon(opened.engine.stop)

    # Files

    async def _fetch(self, files: dict[Cid, FileRef], span: Span, model: str) -> None:
        """Have these files on disk, pinned for this span."""
        here: set[Cid] = set()
        done: dict[Cid, int] = {}
        total = sum(file.size for file in files.values())
        limiter = trio.CapacityLimiter(FETCHES_AT_ONCE)

        def show() -> None:
            self._show(Loading(model, span, "fetching", len(files), len(here), total, sum(done.values())))

        async def one(file: FileRef) -> None:
            def count(so_far: int, _: int) -> None:
                done[file.cid] = so_far
                show()

            async with limiter:
                await self._content.fetch(file, progress=count)
            here.add(file.cid)
            count(file.size, file.size)

        show()
        # Before the first fetch: the room for one file must not be made by evicting another one.
        self._files.pin_only(await self._pin_of(span), files)
        quota = self._files.usage().quota_bytes
        if total > quota and not self._files.files() >= files.keys():
            raise DiskError(
                f"{layers(span.first, span.last)} need {format_size(total)}, content.quota is "
                f"{format_size(quota)}; raise content.quota, or have this node serve fewer layers (serve.layers)"
            )
        try:
            async with trio.open_nursery() as nursery:
                for file in files.values():
                    nursery.start_soon(one, file)
        except* (TransientError, Declined, FatalError, ProtocolError) as group:
            raise _first(group) from group

    async def _pin_of(self, span: Span) -> str:
        for other in [other for other in self._pins if other != span]:
            self._unpin(other)
        while span not in self._pins and len(self._pins) == len(PINS):
            await self._changes.wait()  # old spans must end first
        free = next((name for name in PINS if name not in self._pins.values()), "")
        return self._pins.setdefault(span, free)

    def _unpin(self, span: Span) -> None:
        """Let go of the files of a span unless it is open."""
        if span in self._pins and all(opened.span != span for opened in self._open):
            self._files.unpin(self._pins.pop(span))

    def _show(self, loading: Loading | None) -> None:
        """Progress, for people."""
        self._loading = loading
        if loading is None:
            self._health.clear("loading")
            return
        percent = 100 * loading.bytes_done // max(1, loading.bytes_total)
        fetching = loading.phase == "fetching"
        words = f"{percent} % of {format_size(loading.bytes_total)}" if fetching else "opening"
        span = loading.span
        self._health.set("loading", model=loading.model, layers=layers(span.first, span.last), progress=words)

    # Engines

    def _kv_bytes(self, release: ServedRelease, span: Span) -> int:
        weights = release.facts.weights(span.first, span.last)
        room = max(0, self._settings.memory_bytes - weights)
        reserve = release.facts.need(span.first, span.last) - weights
        return min(room, max(reserve, self._settings.kv_bytes)) if self._settings.kv_bytes else room

    async def _start(self, spec: StageSpec, span: Span) -> OpenSpan:
        engine = self._engines(spec)
        try:
            report = await engine.start()
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
                await engine.stop()
            raise
        opened = OpenSpan(engine, span, self._settings.incarnation, report)
        self._open.append(opened)
        self._tasks.start_soon(self._watch, opened)
        return opened

    def _measure(self, opened: OpenSpan, release: ServedRelease) -> None:
        """Take the figures of a new engine into the moving averages."""
        work = release.facts.span_work(opened.span.first, opened.span.last)
        figures = (opened.report.decode_us, opened.report.prefill_us)
        decode, prefill = (
            _average(old, max(1, us * 1000 // work)) for old, us in zip(self._average_us, figures, strict=True)
        )
        self._average_us = (decode, prefill)
        if any(
            abs(new - old) * CHANGE_SHARE > old for new, old in zip(self._average_us, self._layer_us, strict=True)
        ):
            self._layer_us = self._average_us

    async def _watch(self, opened: OpenSpan) -> None:
        """Notice the end of an engine that nobody has ended."""
        with trio.move_on_after(HEALTHY_S) as young:
            self._lose(opened, await opened.engine.wait_lost())
        if young.cancelled_caught:
            self._restarts.healthy()
            self._health.clear("engine-restarting")
            self._lose(opened, await opened.engine.wait_lost())

    def _lose(self, opened: OpenSpan, reason: str) -> None:
        if opened.lost or opened not in self._open or opened in self._retiring:
            return  # known, or on its way out
        opened.lost = reason
        if opened is self._serving:
            self._serving = None
        self._restarts.lost(trio.current_time(), self._settings.rng.random())
        _log.error("engine.lost", first=opened.span.first, last=opened.span.last, reason=reason)
        self._health.set("engine-restarting", times=counted(self._restarts.failures, "time"), reason=reason)
        self._retire(opened, 0)
        self._changes.notify()

    # Ending

    def _retire(self, opened: OpenSpan, patience_s: float) -> None:
        """End it when its sessions have ended, or after `patience_s`."""
        self._retiring.append(opened)
        self._tasks.start_soon(self._end, opened, patience_s)

    async def _end(self, opened: OpenSpan, patience_s: float) -> None:
        with trio.move_on_after(patience_s):
            await opened.wait_empty()
        await opened.engine.stop()
        self._open.remove(opened)
        self._retiring.remove(opened)
        if not opened.lost:  # or its files are wanted again in a moment
            self._unpin(opened.span)
        self._changes.notify()


def _average(old: int, new: int) -> int:
    """Exponential moving average with 0.9 for the past."""
    return (9 * old + new) // 10 if old else new


def _first(group: BaseExceptionGroup[Any]) -> Exception:
    """One error of a group, to be raised in its place."""
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise EngineLost("an empty group of errors")
