"""The sessions of one engine process: limits, positions, history and sampling, whatever the stage is made of."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from time import perf_counter_ns
from typing import Final

import numpy as np

from meshnode.core.errors import Declined
from meshnode.engine.backend import Array, Stage, Track
from meshnode.engine.sampling import sample
from protocols.enginewire.messages import BAD_INPUT, BUSY, FENCED, TOO_LONG, Load
from protocols.pipe.messages import Sampling

_RETRY_MS: Final = 1000
_PROBE_ROWS: Final = 64
_PROBES: Final = 5


@dataclass(slots=True)
class _Session:
    track: Track
    first: int
    last: int
    capacity: int  # tokens
    kv_bytes: int
    sampling: Sampling | None
    tokens: list[int]  # what is known of the text: the prompt, then what was sampled here
    rows: int = 0  # positions that hold KV


class Sessions:
    def __init__(self, stage: Stage, load: Load) -> None:
        self._stage = stage
        self._load = load
        self._open: dict[bytes, _Session] = {}

    def open(
        self, name: bytes, *, first: int, last: int, capacity: int, sampling: Sampling | None, prompt: Array
    ) -> None:
        """Reserve a session; one of the same name is replaced.

        Args:
          prompt: int32 (tokens,).

        Raises:
          Declined: `fenced` (layers outside the span), `too-long` (above the context or our memory), `busy`.
        """
        load = self._load
        if not load.first <= first < last <= load.last:
            raise Declined(
                FENCED,
                f"This engine holds the layers {load.first} to {load.last - 1}; "
                f"a session wants {first} to {last - 1}.",
            )
        if capacity > load.context:
            raise Declined(
                TOO_LONG,
                f"A session of {capacity} tokens is too long: the model's context is {load.context}. "
                f"Shorten the prompt or ask for fewer tokens.",
            )
        others = [s for known, s in self._open.items() if known != name]
        if len(others) >= load.max_sessions:
            raise Declined(
                BUSY,
                f"All {load.max_sessions} sessions of this engine are taken. Try again soon.",
                retry_ms=_RETRY_MS,
            )
        wanted = kv_bytes(load, first, last, capacity)
        if wanted > load.max_kv_bytes:
            fits = load.max_kv_bytes // kv_bytes(load, first, last, 1)
            raise Declined(
                TOO_LONG,
                f"A session of {capacity} tokens needs {wanted / 1e6:.1f} MB for its keys and values; this node has "
                f"room for {fits} tokens ({load.max_kv_bytes / 1e6:.1f} MB). Ask for fewer, or give it more memory.",
            )
        used = sum(s.kv_bytes for s in others)
        if used + wanted > load.max_kv_bytes:
            raise Declined(
                BUSY,
                f"The session needs {wanted / 1e6:.1f} MB for its keys and values; "
                f"{used / 1e6:.1f} of {load.max_kv_bytes / 1e6:.1f} MB are taken. Try again soon.",
                retry_ms=_RETRY_MS,
            )
        try:
            track = self._stage.open(first, last, capacity)
        except MemoryError:
            raise Declined(
                BUSY, f"The device has no {wanted / 1e6:.1f} MB of memory left for the session.", retry_ms=_RETRY_MS
            ) from None
        self._open[name] = _Session(track, first, last, capacity, wanted, sampling, prompt.tolist())

    def step(
        self, name: bytes, *, position: int, rows: int, body: bytes, sample_after: bool, prefill: bool
    ) -> tuple[Array, int | None]:
        """Run rows: (hidden states for the next stage, no token), or after the last layer (empty, token or None).

        Args:
          body: int32 (rows,) token ids into layer 0, else float32 (rows, hidden).
          sample_after: whether to sample the token after the last row, if this is the last stage.

        Raises:
          Declined: `fenced` (unknown session, gap), `too-long` (above its capacity), `bad-input` (wrong size, no
            token id, logits that are no numbers).
        """
        session = self._open.get(name)
        if session is None:
            raise Declined(FENCED, "This session is not open here (any more). Open it again.")
        end = position + rows
        if position > session.rows:
            raise Declined(
                FENCED, f"A step at position {position} leaves a gap: {session.rows} positions are filled here."
            )
        if end > session.capacity:
            raise Declined(
                TOO_LONG, f"A step up to position {end} does not fit: the session was opened for {session.capacity}."
            )
        data = self._tensor(session, rows, body)
        ends = session.last == self._load.layers
        if sample_after and ends:
            self._require_history(session, end)
        out = session.track.run(position, data, prefill=prefill, wanted=sample_after)
        session.rows = end
        if not ends:
            return out, None
        if not sample_after:
            return np.empty(0, np.float32), None
        if not np.isfinite(out.max()):
            raise Declined(
                BAD_INPUT,
                "The last layer gave logits that are no numbers: the hidden states that came in were wrong.",
            )
        token = sample(out, session.sampling, end, session.tokens[:end])
        session.tokens[end:] = [token]
        return np.empty(0, np.float32), token

    def close(self, name: bytes) -> None:
        self._open.pop(name, None)

    def _tensor(self, session: _Session, rows: int, body: bytes) -> Array:
        """int32 (rows,) or float32 (rows, hidden) over the bytes. Raises Declined `bad-input`."""
        load = self._load
        size = 4 * rows * (1 if session.first == 0 else load.hidden)
        if len(body) != size:
            raise Declined(BAD_INPUT, f"A step of {rows} rows carries {len(body)} bytes instead of {size}.")
        if session.first != 0:
            return np.frombuffer(body, "<f4").reshape(rows, load.hidden)
        ids = np.frombuffer(body, "<i4")
        if not 0 <= int(ids.min()) <= int(ids.max()) < load.vocab:
            raise Declined(BAD_INPUT, f"A step carries a token id outside the vocabulary of {load.vocab}.")
        return ids

    @staticmethod
    def _require_history(session: _Session, end: int) -> None:
        penalised = session.sampling is not None and session.sampling.repetition_milli != 1000
        if penalised and len(session.tokens) < end:
            raise Declined(
                FENCED,
                f"The repetition penalty needs the {end} tokens before this one; the session was opened with "
                f"{len(session.tokens)}.",
            )

    def measure(self) -> tuple[int, int]:
        """Median microseconds of a one-row step, and per row of a 64-row step, over the whole span."""
        load = self._load
        rows = min(_PROBE_ROWS, load.context)
        capacity = min(_PROBE_ROWS + _PROBES, load.context)
        track = self._stage.open(load.first, load.last, capacity)
        shape = (rows,) if load.first == 0 else (rows, load.hidden)
        data = np.ones(shape, np.int32 if load.first == 0 else np.float32)
        many = [_time(track, 0, data, prefill=True) for _ in range(3)]
        one = [_time(track, min(rows + i, capacity - 1), data[:1], prefill=False) for i in range(_PROBES)]
        return round(median(one)), round(median(many) / rows)


def _time(track: Track, position: int, data: Array, *, prefill: bool) -> float:
    begin = perf_counter_ns()
    track.run(position, data, prefill=prefill, wanted=True)
    return (perf_counter_ns() - begin) / 1000


def kv_bytes(load: Load, first: int, last: int, capacity: int) -> int:
    """Bytes of keys and values (float32) that a session reserves."""
    return (last - first) * 2 * load.kv_heads * load.head_dim * 4 * capacity
