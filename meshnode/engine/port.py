"""What services see of an engine: one span of layers of one variant, loaded in a process of its own.

Implemented by `process.py` (a child process that runs `onnx_stage.py` or `null_stage.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from protocols.ids import SessionId
from protocols.manifest.messages import Architecture
from protocols.pipe.messages import Chance, Prefix, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """Everything an engine needs to open the span [first, last)."""

    kind: str  # "onnx" or "null"
    graph: Path  # weightless graph of the whole model
    graph_name: str = ""  # its CID, for people
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
    confined: tuple[str, ...] = ()  # parts of the confinement that hold (`core/confinement/confine.py`)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """The part of an adapter that a span needs."""

    name: str  # its CID
    first: int  # its layers inside the span: [first, last)
    last: int
    rank: int
    alpha: int
    targets: tuple[str, ...]
    layers: Mapping[int, Path]  # the file of each of them (`model/adapter_file.py`)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Either the hidden states for the next stage or, from the last stage when asked to sample, a token."""

    data: bytes  # float32 little endian (rows, hidden), or (hidden,) if pooled; empty when sampled or not wanted
    token: int | None
    compute_us: int
    chances: tuple[Chance, ...] = ()  # of the token, as the sampling of its session wants them


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
        adapter: str = "",
        pooled: bool = False,
        drawn: int = 0,
        prefixes: tuple[Prefix, ...] = (),
    ) -> int:
        """Reserve KV for `capacity` tokens of one session that runs layers [first, last) of this span.

        `prefixes`: beginnings of its prompt, each longer than the one before. Their names tell everything that the
        rows depend on beside the layers and the adapter; the rows of the longest one that `close` has kept are
        taken over. How many that are is returned: the first step may be anywhere up to there.

        `adapter`: the name of one that `adapt` has brought; the session keeps it to its end. "" is none.

        `pooled`: the last stage gives the mean of all rows (after the final norm, of length 1) instead of a token.

        `sampling` and `prompt` (for the penalties) only on the last stage; the last `drawn` tokens of the prompt are
        those of the answer that were drawn before, elsewhere.
        Raises Declined `busy` (no slot or no KV memory), `too-long` (above the context, or all of
        that memory), `fenced` (not our span, no such adapter), `no-pooling` (this model gives no vectors).
        """

    async def adapt(self, adapter: AdapterSpec) -> None:
        """Load an adapter beside those that are there; one of the same name is replaced.

        The first one with new targets has the engine open its layers anew, which holds up all sessions meanwhile.
        Raises Declined `bad-adapter` (damaged, or not for this model), `busy` (no memory), `fenced` (not our span);
        EngineLost, ModelError (a file can't be read). If cancelled, or not loaded: `drop` it.
        """

    async def drop(self, adapter: str) -> None:
        """Forget an adapter; sessions that run with it keep it. Unknown ones are ignored, and a lost engine has none.

        If cancelled: it is forgotten before the next request.
        """

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
        """Run `rows` positions from `position` on: int32 token ids when first == 0, else float32 hidden states.

        Writing at an earlier position rewinds: everything from there on is forgotten. Steps of several
        sessions are run one after the other in the order of the calls. One row is the decode kernel, which
        rounds differently from the others; `prefill` marks rows of a prompt, where one row is padded inside, so
        that results do not depend on how a prompt is cut into steps. Rows of an answer run one by one, by the decode
        kernel: many of them are what single steps were.
        `sample`: the last stage samples the token that follows the last row; `mask`: which tokens it may draw, a bit
        for each, the lowest bit of the first byte for token 0; empty: all of them.
        Raises EngineLost (killed after its deadline), Declined `fenced` (unknown session, a gap in positions) or
        `too-long` (above the session's capacity), RemoteProtocolError (rows of a wrong size, no token ids, hidden
        states that lead to no numbers).
        If cancelled: the step may still run to its end; its result is thrown away.
        """

    async def close(self, session: SessionId, *, keep: bool = False) -> None:
        """Free the session. Unknown sessions are ignored.

        `keep`: the rows of its longest prefix that were run as rows of a prompt stay, as long as no session and no
        adapter wants their memory.
        """

    @property
    def kept_bytes(self) -> int:
        """Keys and values that are kept of sessions which have ended; a part of `max_kv_bytes`."""

    async def stop(self) -> None:
        """End the process (politely, then by kill within 2 s)."""

    async def wait_lost(self) -> str:
        """Wait until the process is gone, whyever (`stop` included); gives the reason in words."""

    @property
    def rss_bytes(self) -> int:
        """Resident memory of the child process."""
