"""Traces: where the time of one question went, on every node that took part. Nothing here knows who collects them.

A trace is named as W3C Trace Context has it (`traceparent`), so that it goes on from, and into, other programs.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

TRACE_BYTES: Final = 16
SPAN_BYTES: Final = 8
MAX_TRACEPARENT: Final = 512  # characters: a later version may have more fields than ours

_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")

Attribute = str | int | float | bool


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A place in a trace: what begins there is a child of this span."""

    trace_id: bytes
    span_id: bytes
    sampled: bool = True  # whether anybody keeps it

    @property
    def traceparent(self) -> str:
        """As the header has it."""
        return f"00-{self.trace_id.hex()}-{self.span_id.hex()}-{int(self.sampled):02x}"


def read_traceparent(text: str) -> TraceContext | None:
    """What a `traceparent` says; None for what is none, which W3C wants ignored."""
    found = _TRACEPARENT.fullmatch(text.strip()) if len(text) <= MAX_TRACEPARENT else None
    if found is None:
        return None
    version, trace, span, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or not int(trace, 16) or not int(span, 16):
        return None
    return TraceContext(bytes.fromhex(trace), bytes.fromhex(span), bool(int(flags, 16) & 1))


def unsampled(random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> TraceContext:
    """A new trace that nobody keeps: its id still tells in the logs of all nodes which lines belong together."""
    return TraceContext(random_bytes(TRACE_BYTES), random_bytes(SPAN_BYTES), sampled=False)


class Span(Protocol):
    """Something that takes time, from `Tracer.begin` to `end`."""

    @property
    def context(self) -> TraceContext | None:
        """Where its children belong; of a span that nobody keeps, where it belongs itself."""

    def end(self, failed: str = "", **attributes: Attribute) -> None:
        """`failed`: why, if it has. Only the first end counts."""


class Tracer(Protocol):
    """Who keeps spans."""

    def begin(self, name: str, parent: TraceContext | None, **attributes: Attribute) -> Span:
        """A span that begins now; without a parent it begins a trace."""


class _Unkept:
    def __init__(self, context: TraceContext | None) -> None:
        self.context = context

    def end(self, failed: str = "", **attributes: Attribute) -> None:
        pass


class NoTracer:
    """Keeps nothing, but passes on where a trace comes from."""

    def begin(self, name: str, parent: TraceContext | None, **attributes: Attribute) -> Span:
        return _Unkept(parent)


class Phases:
    """A span that is cut into phases: each is a child that ends where the next one begins."""

    def __init__(self, tracer: Tracer, name: str, parent: TraceContext | None, **attributes: Attribute) -> None:
        self._tracer = tracer
        self._whole = tracer.begin(name, parent, **attributes)
        self._name = ""
        self._phase: Span | None = None

    @property
    def context(self) -> TraceContext | None:
        return self._whole.context

    def enter(self, name: str) -> None:
        """The phase that runs from now on; empty: none. The one that runs already goes on."""
        if name == self._name:
            return
        if self._phase is not None:
            self._phase.end()
        self._name = name
        self._phase = self._tracer.begin(name, self._whole.context) if name else None

    def end(self, failed: str = "", **attributes: Attribute) -> None:
        """The whole is over, and with it its last phase."""
        self.enter("")
        self._whole.end(failed, **attributes)
