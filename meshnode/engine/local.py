"""The null engine inside this process, in virtual time: for simulations and tests."""

from __future__ import annotations

from typing import Final

import numpy as np
import trio

from meshnode.core.errors import Declined, EngineLost
from meshnode.engine.null_stage import NullStage
from meshnode.engine.port import AdapterSpec, StageReport, StageSpec, StepResult
from meshnode.engine.requests import adapt_request, load_request
from meshnode.engine.sessions import Sessions
from protocols.enginewire.messages import BAD_INPUT
from protocols.errors import RemoteProtocolError
from protocols.ids import SessionId
from protocols.pipe.messages import Prefix, Sampling

RSS_BYTES: Final = 100_000_000  # what a small engine process takes


class LocalEngine:
    """The port `Engine` without a process: a step costs time of trio's clock and no other."""

    def __init__(self, spec: StageSpec, *, load_s: float = 0.1, step_s: float = 0.001) -> None:
        """`load_s`, `step_s`: seconds that opening the span and each call take."""
        self._spec = spec
        self._load_s = load_s
        self._step_s = step_s
        shape = spec.architecture
        stage = NullStage(layers=shape.layers, hidden=shape.hidden, vocab=shape.vocab)
        self._sessions = Sessions(stage, load_request(spec))
        self._one_at_a_time = trio.Lock()
        self._running = False
        self._lost = trio.Event()
        self._reason = ""

    @property
    def spec(self) -> StageSpec:
        return self._spec

    @property
    def rss_bytes(self) -> int:
        return RSS_BYTES if self._running else 0

    @property
    def kept_bytes(self) -> int:
        return 0 if self._lost.is_set() else self._sessions.kept.nbytes

    async def start(self) -> StageReport:
        await trio.sleep(self._load_s)
        self._check()
        self._running = True
        step_us = round(self._step_s * 1e6)
        return StageReport(
            pid=0, load_ms=round(self._load_s * 1000), weight_bytes=0, decode_us=step_us, prefill_us=step_us // 10
        )

    async def open(
        self,
        session: SessionId,
        *,
        first: int,
        last: int,
        capacity: int,
        sampling: Sampling | None,
        prompt: tuple[int, ...],
        adapter: str = "",
        pooled: bool = False,
        drawn: int = 0,
        prefixes: tuple[Prefix, ...] = (),
    ) -> int:
        async with self._one_at_a_time:
            await self._pass_time()
            return self._sessions.open(
                session,
                first=first,
                last=last,
                capacity=capacity,
                sampling=sampling,
                prompt=np.asarray(prompt, np.int32),
                adapter=adapter,
                pooled=pooled,
                drawn=drawn,
                prefixes=prefixes,
            )

    async def adapt(self, adapter: AdapterSpec) -> None:
        async with self._one_at_a_time:
            await self._pass_time()
            self._sessions.adapters.announce(adapt_request(adapter))
            for layer, path in adapter.layers.items():
                self._sessions.adapters.fill(adapter.name, layer, path.read_bytes())

    async def drop(self, adapter: str) -> None:
        async with self._one_at_a_time:
            self._sessions.adapters.drop(adapter)
        await trio.lowlevel.checkpoint()

    async def step(
        self,
        session: SessionId,
        *,
        position: int,
        rows: int,
        data: bytes,
        sample: bool,
        prefill: bool = False,
        mask: bytes = b"",
    ) -> StepResult:
        async with self._one_at_a_time:
            await self._pass_time()
            try:
                out = self._sessions.step(
                    session,
                    position=position,
                    rows=rows,
                    body=data,
                    sample_after=sample,
                    prefill=prefill,
                    mask=mask,
                )
            except Declined as error:
                if error.code == BAD_INPUT:
                    raise RemoteProtocolError(str(error)) from None
                raise
        spent_us = round(self._step_s * 1e6)
        return StepResult(data=out.hidden.tobytes(), token=out.token, compute_us=spent_us, chances=out.chances)

    async def close(self, session: SessionId, *, keep: bool = False) -> None:
        async with self._one_at_a_time:
            self._sessions.close(session, keep=keep)
        await trio.lowlevel.checkpoint()

    async def stop(self) -> None:
        self.lose("it was stopped")
        await trio.lowlevel.checkpoint()

    async def wait_lost(self) -> str:
        await self._lost.wait()
        return self._reason

    def lose(self, reason: str) -> None:
        """It is gone at once, as if its process had been killed."""
        self._running = False
        self._reason = self._reason or reason
        self._lost.set()

    async def _pass_time(self) -> None:
        self._check()
        await trio.sleep(self._step_s)
        self._check()

    def _check(self) -> None:
        if self._lost.is_set():
            raise EngineLost(f"the engine is gone: {self._reason}")
