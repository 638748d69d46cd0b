"""The adapters that our engines have: fetched when a session wants one, kept while somebody may want it again.

An engine has several at once, and each session keeps the one that it was opened with, so what is released next takes
its place between two questions and disturbs none. The released one is loaded before the first question comes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import trio

from meshnode.core.errors import ContentUnavailable, Declined, DiskError, EngineLost, ModelError
from meshnode.core.log import get_logger
from meshnode.core.signal import Watch
from meshnode.engine.port import AdapterSpec, Engine
from meshnode.model.adapter_fit import check_adapter, check_sizes
from meshnode.services.port import Content, ManySpans, OpenSpan, ReleasedAdapter
from protocols.adapter.manifest import AdapterManifest, decode_adapter
from protocols.enginewire.messages import BAD_ADAPTER
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, Cid, cid_codec, short
from protocols.manifest.messages import FileRef

if TYPE_CHECKING:
    from protocols.delta.frame import Frame

NO_ADAPTER: Final = "no-adapter"  # it can't be fetched here; elsewhere it may be
KEPT: Final = 2  # adapters of an engine that nobody uses now: those used last, beside those that are rolled out
FETCHES_AT_ONCE: Final = 4  # files
GOODBYE_S: Final = 5.0

_log = get_logger("adapters")


@dataclass(slots=True)
class _Entry:
    """An adapter of one engine."""

    users: int = 0
    loaded_as: str | None = None  # its name there, "" where it changes no layer of the span; None: not loaded
    loading: trio.Lock = field(default_factory=trio.Lock)


class AdapterService:
    """Loads adapters into engines."""

    name = "adapters"

    def __init__(self, content: Content, spans: ManySpans, released: ReleasedAdapter) -> None:
        self._content = content
        self._spans = spans
        self._released = released
        # the entries of each engine, the one used last behind all others
        self._engines: WeakKeyDictionary[Engine, dict[Cid, _Entry]] = WeakKeyDictionary()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what questions may name now loaded in the engine that serves, until cancelled."""
        task_status.started()
        while True:
            watch = Watch(self._released.changes, self._spans.changes)
            served = self._spans.serving
            if served is not None:
                for adapter in self._released.kept(Cid(served.span.manifest)):
                    await self._load_ahead(served, adapter)
            await watch.next()

    async def _load_ahead(self, served: OpenSpan, adapter: Cid) -> None:
        try:
            async with self.lent(served, adapter):
                pass
        except (Declined, EngineLost) as error:  # whoever asks for it tries again, and is told
            _log.warning("adapter.not_loaded", adapter=short(adapter), reason=str(error))

    @asynccontextmanager
    async def lent(self, served: OpenSpan, adapter: str) -> AsyncIterator[str]:
        """Have an adapter in the engine of a span, for sessions that are opened meanwhile; the name it has there.

        "" is no adapter, and stands for one that changes no layer of the span, too.

        Raises Declined: `no-adapter` (it can't be fetched), `bad-adapter` (it is damaged, or for another model),
        `busy` (no memory); EngineLost. If cancelled: what was fetched is kept in the store.
        """
        if not adapter:
            yield ""
            return
        cid = _checked(adapter)
        entries = self._engines.setdefault(served.engine, {})
        entry = entries.pop(cid, None) or _Entry()
        entries[cid] = entry
        entry.users += 1
        try:
            async with entry.loading:
                if entry.loaded_as is None:
                    entry.loaded_as = await self._load(served, cid)
            yield entry.loaded_as
        finally:
            entry.users -= 1
            with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
                await self._let_go(served)

    async def _let_go(self, served: OpenSpan) -> None:
        """Have the engine forget what nobody uses, but for what questions may name now, and a few others."""
        entries = self._engines.get(served.engine, {})
        kept = self._released.kept(Cid(served.span.manifest))
        idle = [cid for cid, entry in entries.items() if not entry.users and cid not in kept]
        ready = [cid for cid in idle if entries[cid].loaded_as is not None]
        for cid in idle:
            if cid not in ready[-KEPT:]:
                del entries[cid]
                await served.engine.drop(cid)

    async def _load(self, served: OpenSpan, cid: Cid) -> str:
        span, engine = served.span, served.engine
        try:
            manifest, frame = await self._described(cid)
            if manifest.base != span.manifest:
                raise ModelError(
                    f"it was made for the release {short(manifest.base)}; this node serves {short(span.manifest)}"
                )
            check_adapter(manifest, frame)
            check_sizes(frame, engine.spec.architecture)
            files = manifest.files(span.first, span.last)
            if not files:
                return ""
            with ExitStack() as opened:
                paths = await self._opened(files, opened)
                await engine.adapt(
                    AdapterSpec(
                        name=cid,
                        first=min(files),
                        last=max(files) + 1,
                        rank=frame.rank,
                        alpha=frame.alpha,
                        targets=tuple(target.name for target in frame.targets),
                        layers=paths,
                    )
                )
        except RemoteProtocolError as error:
            raise Declined(BAD_ADAPTER, f"the adapter {short(cid)}: {error}") from error
        except ModelError as error:
            raise Declined(BAD_ADAPTER, f"the adapter {short(cid)} can't be used: {error}") from error
        except (ContentUnavailable, DiskError) as error:
            raise Declined(NO_ADAPTER, f"the adapter {short(cid)} can't be fetched: {error}") from error
        _log.info("adapter.loaded", adapter=short(cid), first=min(files), last=max(files) + 1, rank=frame.rank)
        return cid

    async def _described(self, cid: Cid) -> tuple[AdapterManifest, Frame]:
        from protocols.delta.frame import (
            decode_frame,  # brings numpy, 20 MB that a node without adapters does not need
        )

        manifest = decode_adapter(await self._content.block(cid))
        return manifest, decode_frame(await self._content.block(manifest.frame))

    async def _opened(self, files: dict[int, FileRef], opened: ExitStack) -> dict[int, Path]:
        """Where the files of the layers can be read, until `opened` ends."""
        paths: dict[int, Path] = {}
        limiter = trio.CapacityLimiter(FETCHES_AT_ONCE)
        failures: list[Exception] = []

        async def one(layer: int, file: FileRef) -> None:
            async with limiter:
                try:
                    paths[layer] = opened.enter_context(await self._content.open(file))
                except (ContentUnavailable, ModelError, DiskError) as error:
                    failures.append(error)
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for layer, file in files.items():
                nursery.start_soon(one, layer, file)
        if failures:
            raise failures[0]
        return paths


def _checked(adapter: str) -> Cid:
    """Raises Declined `bad-adapter` for what names no adapter."""
    with suppress(RemoteProtocolError):
        if cid_codec(adapter) == DAG_CBOR:
            return Cid(adapter)
    raise Declined(BAD_ADAPTER, f"{adapter[:80]!r} is not the CID of an adapter, which begins with bafyrei")
