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
from protocols.pipe.messages import (
    MAX_ADAPTER_NAME,
    MAX_CHANCES,
    MAX_POSITION,
    MAX_PREFIXES,
    Chance,
    Prefix,
    Sampling,
)

MAX_MESSAGE_BYTES: Final = 1 << 18  # bytes: a Load that names 1026 group files is the largest
MAX_ROWS: Final = 1 << 16
MAX_LAYERS: Final = 1024
MAX_PATH: Final = 4096  # characters
MAX_NAME: Final = 200  # characters
MAX_REASON: Final = 2000  # characters
MAX_PARTS: Final = 16
MAX_RANK: Final = 64
MAX_ALPHA: Final = 4096
MAX_TARGETS: Final = 7
MAX_MASK_BYTES: Final = 1 << 21  # a bit for each token id that a message can hold

# Codes of Refused. `bad-input` blames the sender of the rows, the others are answers to the person who asked.
BUSY, TOO_LONG, FENCED, BAD_INPUT, BAD_ADAPTER = "busy", "too-long", "fenced", "bad-input", "bad-adapter"
NO_POOLING: Final = "no-pooling"
CODES: Final = (BUSY, TOO_LONG, FENCED, BAD_INPUT, BAD_ADAPTER, NO_POOLING)


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
    heads: int = at(16, low=1, high=1 << 16)  # of attention
    graph_name: str = at(17, limit=MAX_NAME)  # for people: its CID


@message(tag=2)
@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Node -> engine: reserve a session. Body: int32 ids of prompt and answer, where tokens will be sampled."""

    number: int = at(1)
    session: bytes = at(2, size=SESSION_BYTES)
    first: int = at(3, high=MAX_LAYERS)
    last: int = at(4, low=1, high=MAX_LAYERS)
    capacity: int = at(5, low=1, high=MAX_POSITION)  # tokens
    sampling: Sampling | None = at(6)
    adapter: str = at(7, limit=MAX_ADAPTER_NAME, default="")  # that it runs with; "": none
    pooled: bool = at(8, default=False)  # after the last layer, the mean of all rows is wanted, and no token
    drawn: int = at(9, high=MAX_POSITION, default=0)  # how many ids of the body are the answer's, drawn elsewhere
    # rows that may be kept, each more than the one before; the names tell the prompt and all else they depend on
    prefixes: tuple[Prefix, ...] = at(10, limit=MAX_PREFIXES, default=())


@message(tag=3)
@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Node -> engine: run rows of one session. Body: the tensor."""

    number: int = at(1)
    session: bytes = at(2, size=SESSION_BYTES)
    position: int = at(3, high=MAX_POSITION)  # of the first row
    rows: int = at(4, low=1, high=MAX_ROWS)
    sample: bool = at(5)
    prefill: bool = at(6)  # rows of the prompt: use the many-row kernels even for one row; others run one by one
    mask: int = at(
        7, high=MAX_MASK_BYTES, default=0
    )  # bytes at the end of the body: a bit for each token that may be


@message(tag=4)
@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Node -> engine: free a session; unknown ones are ignored."""

    number: int = at(1)
    session: bytes = at(2, size=SESSION_BYTES)
    keep: bool = at(3, default=False)  # the rows of its prefixes, for sessions that begin alike


@message(tag=5)
@dataclass(frozen=True, slots=True, kw_only=True)
class Adapt:
    """Node -> engine: an adapter is coming, one AdapterLayer for each of its layers. One of that name is replaced."""

    number: int = at(1)
    adapter: str = at(2, limit=MAX_ADAPTER_NAME)
    first: int = at(3, high=MAX_LAYERS)  # its layers inside the span: [first, last)
    last: int = at(4, low=1, high=MAX_LAYERS)
    rank: int = at(5, low=1, high=MAX_RANK)
    alpha: int = at(6, low=1, high=MAX_ALPHA)  # B (A x) is multiplied by alpha / rank
    targets: tuple[str, ...] = at(7, limit=MAX_TARGETS)  # "q_proj", ...


@message(tag=6)
@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLayer:
    """Node -> engine: the factors of one layer. Body: its file (`meshnode/model/adapter_file.py`)."""

    number: int = at(1)
    adapter: str = at(2, limit=MAX_ADAPTER_NAME)
    layer: int = at(3, high=MAX_LAYERS)


@message(tag=7)
@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Node -> engine: forget an adapter; sessions that run with it keep it. Unknown ones are ignored."""

    number: int = at(1)
    adapter: str = at(2, limit=MAX_ADAPTER_NAME)


@message(tag=16)
@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Engine -> node: the span is open; what was measured on the way."""

    number: int = at(1)
    load_ms: int = at(2)
    weight_bytes: int = at(3)
    decode_us: int = at(4)  # median microseconds of a one-row step over the whole span
    prefill_us: int = at(5)  # median microseconds per row of a 64-row step over the whole span
    confined: tuple[str, ...] = at(6, limit=MAX_PARTS)  # what of its confinement holds: "memory", "files", ...


@message(tag=17)
@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Engine -> node: a request without a result of its own was carried out."""

    number: int = at(1)
    kept_bytes: int = at(2, default=0)  # keys and values that are kept of sessions which have ended


@message(tag=18)
@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """Engine -> node: a step was run. Body: hidden states for the next stage; after the last layer nothing, or
    float32 (hidden,), the mean of all rows."""

    number: int = at(1)
    token: int | None = at(2, high=1 << 24)  # only where a sample was asked for
    compute_us: int = at(3)
    chances: tuple[Chance, ...] = at(4, limit=MAX_CHANCES, default=())  # of the token, as its Sampling wants them


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


@message(tag=21)
@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """Engine -> node: the session is open."""

    number: int = at(1)
    rows: int = at(2, high=MAX_POSITION, default=0)  # that are filled already: one of its prefixes, or none
    kept_bytes: int = at(3, default=0)  # as in Done


Request = Load | Open | Step | Close | Adapt | AdapterLayer | Drop
Answer = Loaded | Done | Stepped | Refused | Failed | Opened
REQUESTS: Final[Union[Request]] = Union(
    "enginewire requests", Load, Open, Step, Close, Adapt, AdapterLayer, Drop, limit=MAX_MESSAGE_BYTES
)
ANSWERS: Final[Union[Answer]] = Union(
    "enginewire answers", Loaded, Done, Stepped, Refused, Failed, Opened, limit=MAX_MESSAGE_BYTES
)
