"""Messages between a node and its engine process. See SPEC.md.

One socket pair, one frame per message. The node asks, the engine answers, in order; every answer carries the
number of its request. Tensors are frame bodies: int32 token ids (rows,), float32 hidden states (rows, hidden),
int32 prompt ids (tokens,), all little endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.codec import Union, at, message
from protocols.ids import SESSION_BYTES
from protocols.pipe.messages import MAX_POSITION, Sampling

MAX_MESSAGE_BYTES: Final = 1 << 18  # bytes: a Load that names 1026 group files is the largest
MAX_ROWS: Final = 1 << 16
MAX_LAYERS: Final = 1024
MAX_PATH: Final = 4096  # characters
MAX_REASON: Final = 2000  # characters

# Codes of Refused. The first three are answers to the person who asked; `bad-input` blames the sender of the rows.
BUSY, TOO_LONG, FENCED, BAD_INPUT = "busy", "too-long", "fenced", "bad-input"
CODES: Final = (BUSY, TOO_LONG, FENCED, BAD_INPUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFile:
    """One weight group on disk."""

    name: str = at(1, limit=32)  # "embed", "layer.7", "head"
    path: str = at(2, limit=MAX_PATH)


@message(tag=1)
@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Node -> engine, first and once: open the span [first, last)."""

    number: int = at(1)
    kind: str = at(2, limit=16)  # "onnx" or "null"
    graph: str = at(3, limit=MAX_PATH)
    groups: tuple[GroupFile, ...] = at(4, limit=MAX_LAYERS + 2)
    first: int = at(5, high=MAX_LAYERS)
    last: int = at(6, low=1, high=MAX_LAYERS)
    layers: int = at(7, low=1, high=MAX_LAYERS)  # of the whole model
    hidden: int = at(8, low=1, high=1 << 20)
    kv_heads: int = at(9, low=1, high=1 << 16)
    head_dim: int = at(10, low=1, high=1 << 16)
    vocab: int = at(11, low=1, high=1 << 24)
    context: int = at(12, low=1, high=MAX_POSITION)  # most positions of a session, tokens
    threads: int = at(13, low=1, high=1024)
    max_sessions: int = at(14, low=1, high=1 << 16)
    max_kv_bytes: int = at(15)


@message(tag=2)
@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Node -> engine: reserve a session. Body: int32 prompt ids, where tokens will be sampled."""

    number: int = at(1)
    session: bytes = at(2, size=SESSION_BYTES)
    first: int = at(3, high=MAX_LAYERS)
    last: int = at(4, low=1, high=MAX_LAYERS)
    capacity: int = at(5, low=1, high=MAX_POSITION)  # tokens
    sampling: Sampling | None = at(6)


@message(tag=3)
@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Node -> engine: run rows of one session. Body: the tensor."""

    number: int = at(1)
    session: bytes = at(2, size=SESSION_BYTES)
    position: int = at(3, high=MAX_POSITION)  # of the first row
    rows: int = at(4, low=1, high=MAX_ROWS)
    sample: bool = at(5)
    prefill: bool = at(6)  # use the many-row kernels even for one row


@message(tag=4)
@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Node -> engine: free a session; unknown ones are ignored."""

    number: int = at(1)
    session: bytes = at(2, size=SESSION_BYTES)


@message(tag=16)
@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Engine -> node: the span is open; what was measured on the way."""

    number: int = at(1)
    load_ms: int = at(2)
    weight_bytes: int = at(3)
    decode_us: int = at(4)  # median microseconds of a one-row step over the whole span
    prefill_us: int = at(5)  # median microseconds per row of a 64-row step over the whole span


@message(tag=17)
@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Engine -> node: an Open or Close was carried out."""

    number: int = at(1)


@message(tag=18)
@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """Engine -> node: a step was run. Body: hidden states for the next stage, or nothing after the last layer."""

    number: int = at(1)
    token: int | None = at(2, high=1 << 24)  # only where a sample was asked for
    compute_us: int = at(3)


@message(tag=19)
@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Engine -> node: no, and why. Nothing has changed."""

    number: int = at(1)
    code: str = at(2, limit=16)
    reason: str = at(3, limit=MAX_REASON)
    retry_ms: int = at(4, default=0)


@message(tag=20)
@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Engine -> node: it can't go on and ends. After a Load: the model is at fault (ModelError)."""

    number: int = at(1)
    reason: str = at(2, limit=MAX_REASON)


Request = Load | Open | Step | Close
Answer = Loaded | Done | Stepped | Refused | Failed
REQUESTS: Final[Union[Request]] = Union("enginewire requests", Load, Open, Step, Close, limit=MAX_MESSAGE_BYTES)
ANSWERS: Final[Union[Answer]] = Union(
    "enginewire answers", Loaded, Done, Stepped, Refused, Failed, limit=MAX_MESSAGE_BYTES
)
