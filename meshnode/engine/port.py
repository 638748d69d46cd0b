"""What services see of an engine: one span of layers of one variant, loaded in a process of its own.

Implemented by `process.py` (a child process that runs `onnx_stage.py` or `null_stage.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from protocols.ids import SessionId
from protocols.manifest.messages import Architecture
from protocols.pipe.messages import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """Everything an engine needs to open the span [first, last)."""

    kind: str  # "onnx" or "null"
    graph: Path  # weightless graph of the whole model
    groups: dict[str, Path]  # "embed", "layer.0", ..., "head" -> safetensors file (only those of the span)
    first: int
    last: int
    architecture: Architecture
    threads: int  # intra-op threads; spinning is always off
    max_sessions: int
    max_kv_bytes: int  # all sessions together


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """What loading found out."""

    pid: int
    load_ms: int
    weight_bytes: int
    decode_us: int  # median microseconds of a one-row step over the whole span
    prefill_us: int  # median microseconds per row of a 64-row step over the whole span


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Either the hidden states for the next stage or, from the last stage when asked to sample, a token."""

    data: bytes  # float32 little endian (rows, hidden); empty when sampled or not wanted
    token: int | None
    compute_us: int


class Engine(Protocol):
    @property
    def spec(self) -> StageSpec: ...

    async def start(self) -> StageReport:
        """Start the process and load the span. Raises EngineLost or ModelError."""

    async def open(
        self,
        session: SessionId,
        *,
        first: int,
        last: int,
        capacity: int,
        sampling: Sampling | None,
        prompt: tuple[int, ...],
    ) -> None:
        """Reserve KV for `capacity` tokens of one session that runs layers [first, last) of this span.

        `sampling` and `prompt` (for the repetition penalty) only on the last stage.
        Raises Declined `busy` (no slot or no KV memory), `too-long` (above the context, or all of
        that memory), `fenced` (not our span).
        """

    async def step(
        self, session: SessionId, *, position: int, rows: int, data: bytes, sample: bool, prefill: bool = False
    ) -> StepResult:
        """Run `rows` positions from `position` on: int32 token ids when first == 0, else float32 hidden states.

        Writing at an earlier position rewinds: everything from there on is forgotten. Steps of several
        sessions are run one after the other in the order of the calls. One row is the decode kernel, which
        rounds differently from the others; `prefill` marks rows of a prompt, where one row is padded inside, so
        that results do not depend on how a prompt is cut into steps.
        `sample`: the last stage samples the token that follows the last row.
        Raises EngineLost (killed after its deadline), Declined `fenced` (unknown session, a gap in positions) or
        `too-long` (above the session's capacity), RemoteProtocolError (rows of a wrong size, no token ids, hidden
        states that lead to no numbers).
        If cancelled: the step may still run to its end; its result is thrown away.
        """

    async def close(self, session: SessionId) -> None:
        """Free the session. Unknown sessions are ignored."""

    async def stop(self) -> None:
        """End the process (politely, then by kill within 2 s)."""

    async def wait_lost(self) -> str:
        """Wait until the process is gone, whyever (`stop` included); gives the reason in words."""

    @property
    def rss_bytes(self) -> int:
        """Resident memory of the child process."""
