"""What a generation is asked for, and what it gives: tokens, and a receipt of how they came."""

from __future__ import annotations

import math
import statistics
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from meshnode.model.release import ServedRelease
from meshnode.policy.chunking import CHUNK_ROWS
from meshnode.services.inference.attempts import HEAL_S
from protocols.pipe.messages import Chance, Grammar, Hop, HopTime, Sampling, Trace

RELEASED: Final = "released"  # the adapter that the network answers with at the moment, if any


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to answer it."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    chunk_rows: int = CHUNK_ROWS
    adapter: str = RELEASED  # or the CID of another one, or "" for the bare model
    grammar: Grammar | None = None  # what the answer has to be
    pooled: bool = False  # the prompt is wanted as one vector; max_tokens and sampling have no say then
    asker: str = ""  # whom this node asks for; what was kept for one of them is no help to another one
    trace: Trace | None = None  # that the spans of its stages belong to
    heal_s: float = HEAL_S  # how long the answer, once begun, waits for layers that were lost; 0: it ends with them
    token_space: tuple[object, ...] = ()  # of the release whose tokenizer made the prompt; empty: whatever is served


@dataclass(slots=True)
class Replaced:
    """A stage that was lost while it answered: others went on."""

    hop: Hop | None  # None: nobody knows which one was silent
    tokens: int  # of the answer, when it was noticed
    lost_at: float  # as the receipt's times
    reason: str
    back_at: float | None = None  # when the next token came


@dataclass(slots=True)
class Receipt:
    """What was run, with figures. Times in seconds (monotonic), hop times in microseconds."""

    route: tuple[Hop, ...]  # at the end
    prompt: tuple[int, ...]
    release: ServedRelease  # which has answered
    adapter: str = ""  # CID of the one that answered; "": the bare model
    cached: int = 0  # tokens of the prompt that every stage had kept of an earlier one
    tokens: list[int] = field(default_factory=list)
    began: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of each token
    hop_times: list[tuple[HopTime, ...]] = field(default_factory=list)  # per token, per stage
    return_us: list[int] = field(default_factory=list)  # per token: last stage -> origin
    reason: str = ""
    stopped_by: str = ""  # the stop text that ended it, if one did
    replaced: list[Replaced] = field(default_factory=list)
    since: int = 0  # tokens that came by other routes than this one

    @property
    def first_token_ms(self) -> float:
        return (self.arrivals[0] - self.began) * 1000 if self.arrivals else math.nan

    @property
    def decode_tokens_s(self) -> float:
        """Tokens per second after the first one; NaN below two tokens."""
        if len(self.arrivals) < 2:
            return math.nan
        return (len(self.arrivals) - 1) / (self.arrivals[-1] - self.arrivals[0])

    def hops(self) -> list[dict[str, object]]:
        """Per stage: who, which layers, and the medians over the decode steps, in milliseconds."""
        times_here = self.hop_times[self.since :]
        steps = times_here[1:] or times_here
        out: list[dict[str, object]] = []
        for index, hop in enumerate(self.route):
            times = [step[index] for step in steps]
            out.append(
                {
                    "peer": hop.peer,
                    "first": hop.first,
                    "last": hop.last,
                    "network_ms": _median_ms([t.network_us for t in times]),
                    "queue_ms": _median_ms([t.queue_us for t in times]),
                    "compute_ms": _median_ms([t.compute_us for t in times]),
                }
            )
        return out

    def return_ms(self) -> float:
        """Median time from the last stage back to us."""
        here = self.return_us[self.since :]
        return _median_ms(here[1:] or here)

    def came(self, token: int, times: tuple[HopTime, ...], return_us: int, now: float) -> None:
        """Note a token."""
        self.tokens.append(token)
        self.arrivals.append(now)
        self.hop_times.append(times)
        self.return_us.append(return_us)
        for loss in reversed(self.replaced):
            if loss.back_at is not None:
                break
            loss.back_at = now

    def lost(self, peer: str | None, reason: str, now: float) -> None:
        """Note that a peer of the route was lost; None for nobody knows which."""
        hop = next((hop for hop in self.route if hop.peer == peer), None)
        self.replaced.append(Replaced(hop, len(self.tokens), now, reason))

    def go_on(self, route: tuple[Hop, ...], release: ServedRelease, adapter: str) -> None:
        """Other stages compute what follows."""
        self.route, self.release, self.adapter = route, release, adapter
        self.since = len(self.tokens)


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of the answer, as it comes. `receipt`: of this answer, up to this token; it goes on growing."""

    token: int
    receipt: Receipt
    chances: tuple[Chance, ...] = ()  # the token's own, then the best ones, as the sampling wants them


@dataclass(frozen=True, slots=True)
class Vector:
    """The prompt as one vector of length 1: the mean of its tokens' hidden states after the final norm."""

    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Waiting:
    """There is no answer yet, and why, as a part of a sentence."""

    why: str


@dataclass(frozen=True, slots=True)
class Taken:
    """Every stage of a route has taken the session: its tokens follow."""

    cached: int = 0  # tokens of the prompt that all of them had kept


class Generator(Protocol):
    """Answers in tokens (`origin.py`)."""

    def check_may_ask(self) -> None:
        """Raises Declined `forbidden` when this node may not ask questions: waiting would not change that."""

    def generate(self, request: Request) -> AsyncGenerator[Taken | Waiting | Piece | Vector | Receipt, None]:
        """That it is taken, tokens as they come or one vector, at last the receipt. Use it in `contextlib.aclosing`.

        When a stage is lost after that, the answer goes on without it, and says so where it has to wait.

        Raises:
          Declined: it may not ask, no model, no route, the prompt is too long, or every stage asked said no.
          PeerUnreachable: a stage was lost on the way (which one, and which layers), and nobody took over in time.

        If cancelled or closed: every stage is told that the session is over (2 s at most).
        """


def _median_ms(values: Sequence[int]) -> float:
    return round(statistics.median(values) / 1000, 3) if values else 0.0
