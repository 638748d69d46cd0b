"""Messages of /meshnode/pipe/1: one generation through a chain of stages. See SPEC.md.

A pipe is a one-way stream of frames from one node to a neighbour; answers travel on the neighbour's own pipe
back. Tensors are frame bodies: int32 token ids (rows,) into the first stage, float32 hidden states
(rows, hidden) between stages, both little endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.codec import Union, at, message
from protocols.ids import SESSION_BYTES

MAX_MESSAGE_BYTES: Final = 128 * 1024
MAX_STAGES: Final = 64
MAX_POSITION: Final = 1 << 20  # tokens
MAX_ADAPTER_NAME: Final = 64  # characters of the CID of an adapter
MAX_CHANCES: Final = 21  # of one token: its own, and those of the 20 best
MAX_GRAMMAR_BYTES: Final = 1 << 16
MAX_PREFIXES: Final = 64
PREFIX_BYTES: Final = 16
TRACE_BYTES: Final = 16
SPAN_BYTES: Final = 8
LOST: Final = "lost"  # a peer went away, or the stage before it could not reach it


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the last stage picks a token. Integers, so that every node computes the same bytes."""

    seed: int = at(1, high=(1 << 63) - 1)
    temperature_milli: int = at(2, high=10_000, default=0)  # 0 is greedy
    top_k: int = at(3, high=1 << 20, default=0)  # 0: off
    top_p_micro: int = at(4, low=1, high=1_000_000, default=1_000_000)
    repetition_milli: int = at(5, low=100, high=10_000, default=1000)  # 1000: no penalty
    min_p_micro: int = at(6, high=1_000_000, default=0)  # of the best one's probability; 0: off
    presence_milli: int = at(8, low=-2000, high=2000, default=0)  # off the logits of tokens of the answer
    frequency_milli: int = at(10, low=-2000, high=2000, default=0)  # the same, times how often they were there
    chances: int = at(12, high=MAX_CHANCES, default=0)  # to tell of each token: 1 is its own, n + 1 the n best, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One stage of a route: who, which start of it, which layers."""

    peer: str = at(1, limit=64)
    incarnation: int = at(2)  # the peer's start time, UTC milliseconds: a restarted peer is another one
    first: int = at(3, high=1024)
    last: int = at(4, high=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class HopTime:
    """Where the time of one step went, added by each stage. Microseconds."""

    network_us: int = at(1)  # from the sender's send to our receive, by the estimated clock offset
    queue_us: int = at(2)  # waiting for the engine, pipes to it included
    compute_us: int = at(3)  # inside the engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """How probable a token was by the model alone, before penalties, temperature and cuts."""

    token: int = at(1, high=1 << 24)
    nano_nats: int = at(2)  # -ln of its probability, in units of 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What the text of an answer has to be: tokens that lead out of it are never drawn."""

    kind: str = at(1, limit=16)  # "json_schema", "json_object", "regex" or "lark"
    text: bytes = at(2, limit=MAX_GRAMMAR_BYTES)  # UTF-8; empty for json_object


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """A beginning of a prompt, by a name that only the same tokens have (`prefixes.py`)."""

    tokens: int = at(1, low=1, high=MAX_POSITION)
    name: bytes = at(2, size=PREFIX_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A place in a trace, as W3C Trace Context has it: spans of this session are its children."""

    id: bytes = at(1, size=TRACE_BYTES)
    span: bytes = at(2, size=SPAN_BYTES)
    sampled: bool = at(3, default=False)  # whether anybody keeps it


@message(tag=1)
@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Origin -> every stage: reserve a session.

    Body: int32 ids of the prompt and of what was drawn already, for the last stage only.
    """

    session: bytes = at(1, size=SESSION_BYTES)
    attempt: int = at(2, high=1 << 16)
    origin: str = at(3, limit=64)
    manifest: str = at(4, limit=64)
    variant: str = at(5, limit=32)
    route: tuple[Hop, ...] = at(6, limit=MAX_STAGES)
    index: int = at(7, high=MAX_STAGES)  # which hop of the route the receiver is
    capacity: int = at(8, low=1, high=MAX_POSITION)  # tokens, prompt and answer
    sampling: Sampling | None = at(9)
    adapter: str = at(10, limit=MAX_ADAPTER_NAME, default="")  # CID of the one that it runs with; "": none
    grammar: Grammar | None = at(14, default=None)  # to the last stage, with sampling
    pooled: bool = at(12, default=False)  # to the last stage, instead of sampling: the mean of all rows is wanted
    drawn: int = at(16, high=MAX_POSITION, default=0)  # to the last stage: how many ids of the body are the answer's
    # beginnings of the prompt, each longer than the one before: rows that a stage may have kept, and may keep
    prefixes: tuple[Prefix, ...] = at(11, limit=MAX_PREFIXES, default=())
    trace: Trace | None = at(13, default=None)


@message(tag=2)
@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """Stage -> origin."""

    session: bytes = at(1, size=SESSION_BYTES)
    attempt: int = at(2, high=1 << 16)
    index: int = at(3, high=MAX_STAGES)
    kept: int = at(5, high=MAX_POSITION, default=0)  # rows that are there already: one of the prefixes, or none


@message(tag=3)
@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Stage -> origin: no, and why. Also ends a session that was open."""

    session: bytes = at(1, size=SESSION_BYTES)
    attempt: int = at(2, high=1 << 16)
    index: int = at(3, high=MAX_STAGES)
    code: str = at(4, limit=32)
    reason: str = at(5, limit=500)
    retry_ms: int = at(6, default=0)


@message(tag=4)
@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """To the next stage: run these rows. Body: the tensor."""

    session: bytes = at(1, size=SESSION_BYTES)
    attempt: int = at(2, high=1 << 16)
    position: int = at(3, high=MAX_POSITION)  # of the first row
    rows: int = at(4, low=1, high=1 << 16)
    sample: bool = at(5)  # whether the last stage samples after the last row
    sent_us: int = at(6)  # the sender's monotonic clock
    times: tuple[HopTime, ...] = at(7, limit=MAX_STAGES, default=())
    prefill: bool = at(8, default=False)  # rows of the prompt, by the many-row kernel; others run one by one


@message(tag=5)
@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """Last stage -> origin: the sampled token and where the time went."""

    session: bytes = at(1, size=SESSION_BYTES)
    attempt: int = at(2, high=1 << 16)
    position: int = at(3, high=MAX_POSITION)  # of the new token
    token: int = at(4, high=1 << 24)
    sent_us: int = at(5)
    times: tuple[HopTime, ...] = at(6, limit=MAX_STAGES, default=())
    chances: tuple[Chance, ...] = at(7, limit=MAX_CHANCES, default=())  # its own, then the best from the best on


@message(tag=6)
@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Origin -> every stage: free the session."""

    session: bytes = at(1, size=SESSION_BYTES)
    attempt: int = at(2, high=1 << 16)
    keep: bool = at(3, default=False)  # all went well: the rows of its prefixes are worth keeping


@message(tag=7)
@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Heartbeat of a pipe, every second; answered on the other pipe."""

    number: int = at(1)
    sent_us: int = at(2)


@message(tag=8)
@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    number: int = at(1)
    ping_sent_us: int = at(2)
    received_us: int = at(3)
    sent_us: int = at(4)


@message(tag=9)
@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """Last stage -> origin: the rows of the whole prompt as one vector. Body: float32 (hidden,), of length 1."""

    session: bytes = at(1, size=SESSION_BYTES)
    attempt: int = at(2, high=1 << 16)
    sent_us: int = at(3)
    times: tuple[HopTime, ...] = at(4, limit=MAX_STAGES, default=())  # of the last step


Message = Open | Opened | Refused | Step | Token | Close | Ping | Pong | Pooled
PIPE: Final[Union[Message]] = Union(
    "/meshnode/pipe/1", Open, Opened, Refused, Step, Token, Close, Ping, Pong, Pooled, limit=MAX_MESSAGE_BYTES
)
