"""The sessions of one engine process: limits, positions, history and sampling, whatever the stage is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from time import perf_counter_ns
from typing import Final

import numpy as np

from meshnode.core.errors import Declined, ModelError
from meshnode.engine.adapters import Adapter, Adapters
from meshnode.engine.backend import Array, Factors, Stage, Track
from meshnode.engine.kept import KeptPrompt, KeptPrompts
from meshnode.engine.pooling import Pool
from meshnode.engine.sampling import chances, masked, needs_history, sample
from meshnode.policy.shares import PROBE_SESSIONS, PROBE_TOKENS
from protocols.enginewire.messages import BAD_INPUT, BUSY, FENCED, NO_POOLING, TOO_LONG, Load
from protocols.pipe.messages import Chance, Prefix, Sampling
from protocols.words import layers

_RETRY_MS: Final = 1000
_PROBE_ROWS: Final = 64
_PROBES: Final = 5
_NOTHING: Final = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class StepOut:
    """What came of a step."""

    hidden: Array  # float32 (rows, hidden) for the next stage; after the last layer (hidden,) if pooled, or empty
    token: int | None = None  # after the last layer, if one was sampled
    chances: tuple[Chance, ...] = ()


@dataclass(slots=True)
class _Session:
    track: Track
    first: int
    last: int
    capacity: int  # tokens
    kv_bytes: int
    sampling: Sampling | None
    adapter: Adapter | None  # held as long as the session: it counts while it is used
    adapter_name: str
    tokens: list[int]  # what is known of the text: the prompt, then the answer so far
    prompt: int  # how many of them are the prompt
    pool: Pool | None = None  # of one that wants no tokens
    rows: int = 0  # positions that hold KV
    prompt_rows: int = 0  # of them, those from 0 on that were run as rows of a prompt
    prefixes: tuple[Prefix, ...] = ()


class Sessions:
    def __init__(self, stage: Stage, load: Load) -> None:
        self._stage = stage
        self._load = load
        self._open: dict[bytes, _Session] = {}
        self.kept = KeptPrompts()
        self.adapters = Adapters(
            stage, load, lambda: sum(session.kv_bytes for session in self._open.values()), self.kept.shrink
        )

    def open(
        self,
        name: bytes,
        *,
        first: int,
        last: int,
        capacity: int,
        sampling: Sampling | None,
        prompt: Array,
        adapter: str = "",
        pooled: bool = False,
        drawn: int = 0,
        prefixes: Sequence[Prefix] = (),
    ) -> int:
        """Reserve a session; one of the same name is replaced.

        Args:
          prefixes: beginnings of the prompt, each longer than the one before. Rows of a session that ended are
            taken over, up to the longest of them that was kept.
          pooled: after the last layer, the mean of all rows is wanted (`pooling.py`), and no token.
          prompt: int32 (tokens,), and after it what was drawn elsewhere of the answer.
          drawn: how many of these tokens are the answer's.
          adapter: the name of the one that it runs with to its end; "" for none.

        Returns:
          how many rows are filled already.

        Raises:
          Declined: `fenced` (layers outside the span, no such adapter), `too-long` (above the context or our
            memory), `busy`, `no-pooling` (this model gives no vectors).
        """
        load = self._load
        if not load.first <= first < last <= load.last:
            raise Declined(
                FENCED,
                f"This engine holds {layers(load.first, load.last)}; a session wants {layers(first, last)}.",
            )
        used_adapter = self.adapters.of(adapter, first, last)
        if capacity > load.context:
            raise Declined(
                TOO_LONG,
                f"A session of {capacity} tokens is too long: the model's context is {load.context}. "
                f"Shorten the prompt or ask for fewer tokens.",
            )
        probe = capacity <= PROBE_TOKENS  # few and tiny, and beside the sessions (`policy/shares.py`)
        others = [s for known, s in self._open.items() if known != name and (s.capacity <= PROBE_TOKENS) == probe]
        most = PROBE_SESSIONS if probe else load.max_sessions
        if len(others) >= most:
            raise Declined(BUSY, f"All {most} sessions of this engine are taken. Try again soon.", retry_ms=_RETRY_MS)
        wanted = kv_bytes(load, first, last, capacity)
        if wanted > load.max_kv_bytes:
            fits = load.max_kv_bytes // kv_bytes(load, first, last, 1)
            raise Declined(
                TOO_LONG,
                f"A session of {capacity} tokens needs {wanted / 1e6:.1f} MB for its keys and values; this node has "
                f"room for {fits} tokens ({load.max_kv_bytes / 1e6:.1f} MB). Ask for fewer, or give it more memory.",
            )
        used = sum(s.kv_bytes for s in others) + self.adapters.nbytes
        if used + wanted > load.max_kv_bytes and not probe:
            raise Declined(
                BUSY,
                f"The session needs {wanted / 1e6:.1f} MB for its keys and values; "
                f"{used / 1e6:.1f} of {load.max_kv_bytes / 1e6:.1f} MB are taken by sessions and adapters. "
                "Try again soon.",
                retry_ms=_RETRY_MS,
            )
        fitting = () if pooled else tuple(prefix for prefix in prefixes if prefix.tokens <= capacity)
        found = self.kept.find((first, last, adapter), fitting)
        self.kept.shrink(load.max_kv_bytes - used - wanted, spare=None if found is None else found[0])
        try:
            factors = {} if used_adapter is None else used_adapter.factors
            track = self._track(first, last, capacity, factors, pooled)
        except ModelError as error:
            if not pooled:
                raise
            raise Declined(NO_POOLING, str(error)) from error
        except MemoryError:
            raise Declined(
                BUSY, f"The device has no {wanted / 1e6:.1f} MB of memory left for the session.", retry_ms=_RETRY_MS
            ) from None
        pool = Pool(load.hidden) if pooled and last == load.layers else None
        session = self._open[name] = _Session(
            track,
            first,
            last,
            capacity,
            wanted,
            sampling,
            used_adapter,
            adapter,
            prompt.tolist(),
            len(prompt) - drawn,
            pool,
            prefixes=fitting,
        )
        if found is not None and found[0] in self.kept:
            # beside the session where both fit, else in it
            session.rows = session.prompt_rows = self._fill(track, *found, load.max_kv_bytes - used - wanted)
        return session.rows

    def _track(self, first: int, last: int, capacity: int, factors: Mapping[int, Factors], normed: bool) -> Track:
        """Raises ModelError, MemoryError: even without what is kept for later."""
        try:
            return self._stage.open(first, last, capacity, factors, normed=normed)
        except MemoryError:
            if not self.kept:
                raise
        self.kept.shrink(0)
        return self._stage.open(first, last, capacity, factors, normed=normed)

    def _fill(self, track: Track, prompt: KeptPrompt, count: int, room: int) -> int:
        """Have the rows of a prompt in a new track. `room`: bytes that all kept prompts may take beside it."""
        move = self.kept.nbytes > room
        if move:
            self.kept.remove(prompt)
        track.fill(prompt.rows, count, move=move)
        return count

    def step(
        self,
        name: bytes,
        *,
        position: int,
        rows: int,
        body: bytes,
        sample_after: bool,
        prefill: bool,
        mask: bytes = b"",
    ) -> StepOut:
        """Run rows.

        Args:
          body: int32 (rows,) token ids into layer 0, else float32 (rows, hidden).
          prefill: rows of the prompt; those of an answer run one by one.
          sample_after: whether to sample the token after the last row, if this is the last stage.
          mask: a bit for each token that may be drawn, the lowest bit of the first byte for token 0; empty: all.

        Raises:
          Declined: `fenced` (unknown session, gap), `too-long` (above its capacity), `bad-input` (wrong size, no
            token id, logits that are no numbers, a mask that fits no token), `busy` (no memory for the rows).
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
        pool = session.pool
        if sample_after and ends and pool is None:
            self._require_history(session, end)
        try:
            out = self._run(session.track, position, data, prefill, sample_after)
        except MemoryError:
            raise Declined(
                BUSY, f"This node has no memory left for a step of {rows} rows. Try again soon.", retry_ms=_RETRY_MS
            ) from None
        session.rows = end
        if not prefill:
            session.prompt_rows = min(session.prompt_rows, position)
        elif position <= session.prompt_rows:
            session.prompt_rows = end
        if pool is not None:
            pool.add(position, out)
            return StepOut(pool.mean() if sample_after else _NOTHING)
        if not ends:
            return StepOut(out)
        if not sample_after:
            return StepOut(_NOTHING)
        if not np.isfinite(out.max()):
            raise Declined(
                BAD_INPUT,
                "The last layer gave logits that are no numbers: the hidden states that came in were wrong.",
            )
        sampling = session.sampling
        allowed = masked(out, mask) if mask else out
        token = sample(allowed, sampling, end, session.tokens[:end], session.tokens[session.prompt : end])
        session.tokens[end:] = [token]
        return StepOut(_NOTHING, token, chances(out, token, 0 if sampling is None else sampling.chances))

    def _run(self, track: Track, position: int, data: Array, prefill: bool, wanted: bool) -> Array:
        """Raises MemoryError: even without what is kept for later."""
        try:
            return _run(track, position, data, prefill=prefill, wanted=wanted)
        except MemoryError:
            if not self.kept:
                raise
        self.kept.shrink(0)
        return _run(track, position, data, prefill=prefill, wanted=wanted)

    def close(self, name: bytes, *, keep: bool = False) -> None:
        """Free a session; unknown ones are ignored. `keep`: but for the rows of its longest prefix."""
        session = self._open.pop(name, None)
        if session is None or not keep:
            return
        held = [prefix for prefix in session.prefixes if prefix.tokens <= session.prompt_rows]
        scope = (session.first, session.last, session.adapter_name)
        if not held or self.kept.has(scope, held[-1]):
            return
        count = held[-1].tokens
        with suppress(MemoryError):
            rows = session.track.keep(count)
            nbytes = kv_bytes(self._load, session.first, session.last, count)
            self.kept.add(KeptPrompt(scope, rows, nbytes, {prefix.name: prefix.tokens for prefix in held}))

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
        if needs_history(session.sampling) and len(session.tokens) < end:
            raise Declined(
                FENCED,
                f"A penalty on tokens needs the {end} before this one; the session was opened with "
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


def _run(track: Track, position: int, data: Array, *, prefill: bool, wanted: bool) -> Array:
    """What a track makes of rows: those of a prompt at once, those of an answer one by one, as when it was drawn."""
    if prefill or len(data) == 1:
        return track.run(position, data, prefill=prefill, wanted=wanted)
    out = [
        track.run(position + i, data[i : i + 1], prefill=False, wanted=wanted and i == len(data) - 1).copy()
        for i in range(len(data))
    ]
    return np.concatenate(out)


def _time(track: Track, position: int, data: Array, *, prefill: bool) -> float:
    begin = perf_counter_ns()
    track.run(position, data, prefill=prefill, wanted=True)
    return (perf_counter_ns() - begin) / 1000


def kv_bytes(load: Load, first: int, last: int, capacity: int) -> int:
    """Bytes of keys and values (float32) that a session reserves."""
    return (last - first) * 2 * load.kv_heads * load.head_dim * 4 * capacity
