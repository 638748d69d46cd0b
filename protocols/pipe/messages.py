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
PREFILL_ROW_S: Final = 0.25  # added per prompt row: the slowest device we mean to wait for
LOST: Final = "lost"  # a peer went away, or the stage before it could not reach it


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the last stage picks a token. Integers, so that every node computes the same bytes."""

    seed: int = at(1, high=(1 << 63) - 1)
    temperature_milli: int = at(2, high=10_000, default=0)  # 0 is greedy
    top_k: int = at(3, high=1 << 20, default=0)  # 0: off
    top_p_micro: int = at(4, low=1, high=1_000_000, default=1_000_000)
    repetition_milli: int = at(5, low=100, high=10_000, default=1000)  # 1000: no penalty


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


@message(tag=1)
@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Origin -> every stage: reserve a session. Body: int32 prompt ids, for the last stage only."""

    session: bytes = at(1, size=SESSION_BYTES)
    attempt: int = at(2, high=1 << 16)
    origin: str = at(3, limit=64)
    manifest: str = at(4, limit=64)
    variant: str = at(5, limit=32)
    route: tuple[Hop, ...] = at(6, limit=MAX_STAGES)
    index: int = at(7, high=MAX_STAGES)  # which hop of the route the receiver is
    capacity: int = at(8, low=1, high=MAX_POSITION)  # tokens, prompt and answer
    sampling: Sampling | None = at(9)


@message(tag=2)
@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """Stage -> origin."""

    session: bytes = at(1, size=SESSION_BYTES)
    attempt: int = at(2, high=1 << 16)
    index: int = at(3, high=MAX_STAGES)


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
    prefill: bool = at(8, default=False)  # rows of the prompt: run by the many-row kernel even if it is one row


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


@message(tag=6)
@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Origin -> every stage: free the session."""

    session: bytes = at(1, size=SESSION_BYTES)
    attempt: int = at(2, high=1 << 16)


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


Message = Open | Opened | Refused | Step | Token | Close | Ping | Pong
PIPE: Final[Union[Message]] = Union(
    "/meshnode/pipe/1", Open, Opened, Refused, Step, Token, Close, Ping, Pong, limit=MAX_MESSAGE_BYTES
)
