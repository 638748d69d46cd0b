"""The conformance suite of the engine port: every check in `CHECKS` holds on every kind of engine."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import trio

from meshnode.core.errors import Declined, EngineLost
from meshnode.engine.port import AdapterSpec, Engine, StageSpec, StepResult
from meshnode.engine.process import Deadlines, EngineProcess
from protocols.errors import RemoteProtocolError
from protocols.ids import SessionId
from protocols.manifest.messages import Architecture
from protocols.pipe.messages import Prefix, Sampling
from tests.adapters import written

# make(first, last, ...) -> a started engine of one small model that ends with the context
Make = Callable[..., AbstractAsyncContextManager[Engine]]
_ARCHITECTURE = Architecture(
    family="null",
    layers=4,
    hidden=8,
    heads=2,
    kv_heads=1,
    head_dim=4,
    vocab=64,
    context=128,
    bos_ids=(),
    eos_ids=(),
)
NULL = StageSpec(
    kind="null",
    graph=Path("none"),
    groups={},
    first=0,
    last=4,
    architecture=_ARCHITECTURE,
    threads=1,
    max_sessions=8,
    max_kv_bytes=1 << 30,
)
PROMPT = (5, 17, 3, 9, 60, 2, 33, 8, 1, 44, 7)


def name(number: int) -> SessionId:
    return SessionId(number.to_bytes(16, "big"))


def ids(*tokens: int) -> bytes:
    return np.asarray(tokens, "<i4").tobytes()


async def enter(
    engine: Engine,
    session: int = 1,
    *,
    capacity: int,
    sampling: Sampling | None = None,
    prompt: Sequence[int] = (),
    adapter: str = "",
    prefixes: tuple[Prefix, ...] = (),
) -> int:
    """Open a session over the whole span of an engine."""
    spec = engine.spec
    return await engine.open(
        name(session),
        first=spec.first,
        last=spec.last,
        capacity=capacity,
        sampling=sampling,
        prompt=tuple(prompt),
        adapter=adapter,
        prefixes=prefixes,
    )


async def say(
    engine: Engine, tokens: Sequence[int], position: int = 0, *, session: int = 1, prefill: bool = True
) -> StepResult:
    """Rows of tokens, the next one sampled."""
    return await engine.step(
        name(session), position=position, rows=len(tokens), data=ids(*tokens), sample=True, prefill=prefill
    )


async def generate(
    engines: list[Engine],
    count: int,
    *,
    chunks: tuple[int, ...] = (len(PROMPT),),
    session: int = 1,
    adapter: str = "",
) -> list[int]:
    """Greedy tokens of one session over a chain of engines, the prompt in steps of these sizes."""
    capacity = len(PROMPT) + count
    for engine in engines:
        await enter(engine, session, capacity=capacity, prompt=PROMPT, adapter=adapter)
    token: int | None = None
    position = 0
    for rows in chunks:
        data = ids(*PROMPT[position : position + rows])
        for engine in engines:
            sample = position + rows == len(PROMPT)
            result = await engine.step(
                name(session), position=position, rows=rows, data=data, sample=sample, prefill=True
            )
            data, token = result.data, result.token
        position += rows
    out = []
    while len(out) < count:
        assert token is not None
        out.append(token)
        data = ids(token)
        for engine in engines:
            result = await engine.step(name(session), position=position, rows=1, data=data, sample=True)
            data, token = result.data, result.token
        position += 1
    for engine in engines:
        await engine.close(name(session))
    return out


async def _check_report(make: Make) -> None:
    async with make(0, 4) as engine:
        assert engine.rss_bytes > 1_000_000
        assert engine.spec.first == 0


async def _check_cuts_agree(make: Make) -> None:
    async with make(0, 4) as whole, make(0, 1) as a, make(1, 3) as b, make(3, 4) as c:
        expected = await generate([whole], 6)
        assert await generate([a, b, c], 6) == expected
        assert await generate([whole], 6, chunks=(4, 1, 6)) == expected
        assert await generate([a, b, c], 6, chunks=(1, 9, 1)) == expected
        assert len(set(expected)) > 1, "a model that always says the same can't show a difference"


async def _check_part_of_a_span(make: Make) -> None:
    """A session may run a part of the span; the numbers are those of the whole."""
    async with make(0, 4) as engine:
        expected = await generate([engine], 3)
        capacity = len(PROMPT) + 3
        parts = ((0, 2), (2, 3), (3, 4))
        for i, (first, last) in enumerate(parts):
            await engine.open(name(10 + i), first=first, last=last, capacity=capacity, sampling=None, prompt=PROMPT)
        data, rows, position, out = ids(*PROMPT), len(PROMPT), 0, []
        for _ in range(3):
            for i in range(len(parts)):
                result = await engine.step(
                    name(10 + i), position=position, rows=rows, data=data, sample=True, prefill=position == 0
                )
                data = result.data
            assert result.token is not None
            out.append(result.token)
            position, rows, data = position + rows, 1, ids(result.token)
        assert out == expected


async def _check_output_shapes(make: Make) -> None:
    async with make(0, 2) as first, make(2, 4) as last:
        hidden = first.spec.architecture.hidden
        for engine in (first, last):
            await enter(engine, capacity=8, prompt=(1, 2, 3))
        one = await say(first, (1, 2, 3))
        assert len(one.data) == 3 * hidden * 4 and one.token is None and one.compute_us >= 0
        two = await last.step(name(1), position=0, rows=3, data=one.data, sample=False, prefill=True)
        assert two.data == b"" and two.token is None
        again = await last.step(name(1), position=0, rows=3, data=one.data, sample=True, prefill=True)
        assert again.data == b"" and again.token is not None


async def _check_pooling(make: Make) -> None:
    """The mean over the rows of a text is the same however layers and rows are cut, to the last bit."""

    async def vector(*cuts: int, chunk: int = len(PROMPT)) -> bytes:
        borders = (0, *cuts, 4)
        async with AsyncExitStack() as stack:
            parts = [await stack.enter_async_context(make(a, b)) for a, b in pairwise(borders)]
            for engine, (a, b) in zip(parts, pairwise(borders), strict=True):
                await engine.open(
                    name(1), first=a, last=b, capacity=len(PROMPT), sampling=None, prompt=(), pooled=b == 4
                )
            for begin in range(0, len(PROMPT), chunk):
                rows = PROMPT[begin : begin + chunk]
                data, ends = ids(*rows), begin + len(rows) == len(PROMPT)
                for engine in parts:
                    result = await engine.step(
                        name(1), position=begin, rows=len(rows), data=data, sample=ends, prefill=True
                    )
                    data = result.data
                assert result.token is None and (data == b"") == (not ends)
            return data

    whole = await vector()
    values = np.frombuffer(whole, "<f4")
    assert len(values) == 8 or len(values) == 64
    assert abs(float(np.linalg.norm(values)) - 1) < 1e-5
    assert await vector(chunk=3) == whole
    assert await vector(1, 3, chunk=4) == whole


async def _check_mask(make: Make) -> None:
    """Only tokens of the mask are drawn; a mask that fits none is an error of who sent it."""
    async with make(0, 4) as engine:
        await enter(engine, capacity=32, prompt=PROMPT)
        size = -(-engine.spec.architecture.vocab // 8)
        for token in (3, 60):
            mask = bytearray(size)
            mask[token >> 3] |= 1 << (token & 7)
            result = await engine.step(
                name(1),
                position=0,
                rows=len(PROMPT),
                data=ids(*PROMPT),
                sample=True,
                prefill=True,
                mask=bytes(mask),
            )
            assert result.token == token
        for wrong in (bytes(size), b"\xff"):
            with pytest.raises(RemoteProtocolError, match="mask"):
                await engine.step(
                    name(1), position=len(PROMPT), rows=1, data=ids(3), sample=True, prefill=False, mask=wrong
                )
        free = await say(engine, PROMPT)
        assert free.token is not None


async def _check_rewind(make: Make) -> None:
    """Writing at an earlier position forgets what was there."""
    async with make(0, 4) as engine:
        await enter(engine, capacity=16, prompt=PROMPT)
        straight = await say(engine, PROMPT)
        await say(engine, (9, 9, 9, 9, 9), 4)
        back = await say(engine, PROMPT[4:], 4)
        assert back.token == straight.token
        await say(engine, PROMPT[2:3], 2)
        with pytest.raises(Declined) as caught:  # the rows after 3 are gone
            await say(engine, (1,), 11, prefill=False)
        assert caught.value.code == "fenced"


async def _check_refusals(make: Make) -> None:
    async with make(1, 3, max_sessions=2) as engine:
        arch = engine.spec.architecture
        hidden = arch.hidden

        async def refused(code: str, words: str, call: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(Declined) as caught:
                await call()
            assert caught.value.code == code and words in str(caught.value), caught.value
            assert (caught.value.retry_ms > 0) == (code == "busy")

        async def part(session: int, first: int = 1, last: int = 3, capacity: int = 8) -> None:
            await engine.open(name(session), first=first, last=last, capacity=capacity, sampling=None, prompt=())

        async def step(session: int, position: int, rows: int) -> object:
            data = np.ones((rows, hidden), "<f4").tobytes()
            return await engine.step(name(session), position=position, rows=rows, data=data, sample=False)

        await refused("fenced", "holds layers 1 to 2", lambda: part(1, 0, 3))
        await refused("fenced", "holds layers 1 to 2", lambda: part(1, 2, 4))
        await refused("too-long", str(arch.context), lambda: part(1, capacity=arch.context + 1))
        await refused("fenced", "not open here", lambda: step(1, 0, 1))
        await part(1)
        await refused("fenced", "leaves a gap", lambda: step(1, 1, 1))
        await refused("too-long", "opened for 8", lambda: step(1, 0, 9))
        await step(1, 0, 2)
        await refused("fenced", "leaves a gap", lambda: step(1, 3, 1))
        with pytest.raises(RemoteProtocolError, match="instead of"):
            await engine.step(name(1), position=2, rows=2, data=b"1234", sample=False)
        await part(2)
        await part(2)  # the same session again takes no second slot
        await refused("busy", "All 2 sessions", lambda: part(3))
        await engine.close(name(99))
        await engine.close(name(2))
        await part(3)
        await step(1, 2, 1)  # a refusal changed nothing


async def _check_memory_limit(make: Make) -> None:
    async with make(0, 4) as engine:
        arch = engine.spec.architecture
        per_token = 4 * 2 * arch.kv_heads * arch.head_dim * 4
    async with make(0, 4, max_kv_bytes=per_token * 20) as engine:
        await enter(engine, 1, capacity=15)
        with pytest.raises(Declined, match="keys and values") as caught:
            await enter(engine, 2, capacity=6)
        assert caught.value.code == "busy"
        await enter(engine, 2, capacity=5)
        await engine.close(name(1))
        await engine.close(name(2))
        with pytest.raises(Declined, match="room for 20 tokens") as caught:
            await enter(engine, 3, capacity=21)
        assert caught.value.code == "too-long"


async def _check_bad_tokens(make: Make) -> None:
    async with make(0, 4) as engine:
        await enter(engine, 1, capacity=8)
        for token in (-1, engine.spec.architecture.vocab):
            with pytest.raises(RemoteProtocolError, match="vocabulary"):
                await say(engine, (token,))


async def _check_seeded_sampling(make: Make) -> None:
    sampling = Sampling(seed=7, temperature_milli=1500, top_k=40, top_p_micro=950_000, repetition_milli=1100)
    tokens = []
    async with make(0, 4) as engine:
        for session in (1, 2):
            await enter(engine, session, capacity=20, sampling=sampling, prompt=PROMPT)
            result = await say(engine, PROMPT, session=session)
            out = []
            for position in range(11, 19):
                assert result.token is not None
                out.append(result.token)
                result = await say(engine, out[-1:], position, session=session, prefill=False)
            tokens.append(out)
        assert tokens[0] == tokens[1]
        assert len(set(tokens[0])) > 1
        await enter(engine, 3, capacity=20, sampling=sampling, prompt=PROMPT[:3])
        with pytest.raises(Declined, match="penalty on tokens"):
            await say(engine, PROMPT, session=3)


async def _check_an_answer_goes_on(make: Make) -> None:
    """Another engine that runs the rows once more draws what the first one would have drawn."""
    sampling = Sampling(seed=7, temperature_milli=1500, repetition_milli=1300, presence_milli=500, chances=3)
    async with make(0, 4) as first, make(0, 4) as other:
        await enter(first, capacity=32, sampling=sampling, prompt=PROMPT)
        results = [await say(first, PROMPT)]
        for position in range(len(PROMPT), len(PROMPT) + 12):
            results.append(await say(first, (_token(results[-1]),), position, prefill=False))
        drawn = [_token(result) for result in results]
        for many in (1, 5, 12):
            spoken = drawn[:many]
            await other.open(
                name(1), first=0, last=4, capacity=32, sampling=sampling, prompt=(*PROMPT, *spoken), drawn=many
            )
            await other.step(name(1), position=0, rows=len(PROMPT), data=ids(*PROMPT), sample=False, prefill=True)
            again = await say(other, spoken, len(PROMPT), prefill=False)
            assert (again.token, again.chances) == (results[many].token, results[many].chances)
            following = await say(other, (_token(again),), len(PROMPT) + many, prefill=False)
            if many + 1 < len(results):
                assert (following.token, following.chances) == (results[many + 1].token, results[many + 1].chances)


def _token(result: StepResult) -> int:
    assert result.token is not None
    return result.token


async def _check_many_callers(make: Make) -> None:
    """Steps of several sessions may be called at the same time; each session gets its own answers."""
    async with make(0, 4) as engine:
        expected = await generate([engine], 5)
        found: dict[int, list[int]] = {}

        async def one(session: int) -> None:
            found[session] = await generate([engine], 5, session=session, chunks=(session, 11 - session))

        async with trio.open_nursery() as nursery:
            for session in (1, 2, 3, 4):
                nursery.start_soon(one, session)
        assert found == dict.fromkeys((1, 2, 3, 4), expected)


async def _check_cancelled_caller(make: Make) -> None:
    """A caller that goes away leaves the engine usable, and its closes are not lost."""
    async with make(0, 4, max_sessions=1) as engine:
        await enter(engine, 1, capacity=64)
        with trio.CancelScope() as scope:
            scope.cancel()
            await say(engine, (1, 2))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_soon, nursery.cancel_scope)
            await say(engine, [i % 50 for i in range(60)])
        with trio.CancelScope() as scope:
            scope.cancel()
            await engine.close(name(1))
        assert len(await generate([engine], 3, session=2)) == 3


async def _cancel_soon(scope: trio.CancelScope) -> None:
    await trio.lowlevel.checkpoint()
    scope.cancel()


async def _check_adapters(make: Make) -> None:
    """A session runs with the adapter that it was opened with, over any cut, whatever comes and goes meanwhile."""
    with TemporaryDirectory() as folder:

        def adapter(number: int, first: int, last: int) -> AdapterSpec:
            return written(Path(folder) / f"{number}", f"adapter {number}", number, first, last)

        async with make(0, 4) as whole, make(0, 1) as a, make(1, 3) as b, make(3, 4) as c:
            plain = await generate([whole], 6)
            await whole.adapt(adapter(1, 0, 4))
            assert await generate([whole], 6) == plain
            adapted = await generate([whole], 6, adapter="adapter 1")
            assert adapted != plain
            for engine in (a, b, c):
                await engine.adapt(adapter(1, engine.spec.first, engine.spec.last))
            assert await generate([a, b, c], 6, adapter="adapter 1", chunks=(1, 9, 1)) == adapted
            await enter(whole, 1, capacity=20, prompt=PROMPT, adapter="adapter 1")
            await whole.adapt(adapter(2, 1, 3))
            await whole.drop("adapter 1")
            await whole.drop("adapter 9")
            assert (await say(whole, PROMPT)).token == adapted[0]
            with pytest.raises(Declined, match="not loaded here") as caught:
                await enter(whole, 2, capacity=20, adapter="adapter 1")
            assert caught.value.code == "fenced"
            assert len(await generate([whole], 3, session=3, adapter="adapter 2")) == 3
            damaged = adapter(3, 0, 4)
            damaged.layers[2].write_bytes(damaged.layers[2].read_bytes()[:-1])
            with pytest.raises(Declined, match="file of layer 2 of the adapter") as caught:
                await whole.adapt(damaged)
            assert caught.value.code == "bad-adapter"
            assert await generate([whole], 6, session=4) == plain


def _beginnings(*ends: int) -> tuple[Prefix, ...]:
    return tuple(Prefix(tokens=end, name=bytes([end] * 16)) for end in ends)


async def _check_kept_rows(make: Make) -> None:
    """A session that begins like one that has ended goes on from its rows, with the tokens of one that does not."""
    async with make(0, 4) as engine:
        expected = await generate([engine], 4)
        await enter(engine, 1, capacity=30, prompt=PROMPT, prefixes=_beginnings(4, 7))
        await say(engine, PROMPT[:7])
        assert engine.kept_bytes == 0
        await engine.close(name(1), keep=True)
        arch = engine.spec.architecture
        assert engine.kept_bytes == 4 * 2 * arch.kv_heads * arch.head_dim * 4 * 7

        async def answer(session: int, ends: tuple[int, ...], begin: int) -> list[int]:
            assert await enter(engine, session, capacity=20, prompt=PROMPT, prefixes=_beginnings(*ends)) == begin
            result = await say(engine, PROMPT[begin:], begin, session=session)
            out = []
            for position in range(11, 15):
                assert result.token is not None
                out.append(result.token)
                result = await say(engine, out[-1:], position, session=session, prefill=False)
            await engine.close(name(session))
            return out

        assert await answer(2, (4, 7, 11), 7) == expected
        assert await answer(3, (4, 11), 4) == expected, "what was kept is there for more than one"
        assert await answer(4, (3, 11), 0) == expected
        assert await enter(engine, 5, capacity=6, prefixes=_beginnings(4, 7)) == 4, "rows that fit into the session"
        await say(engine, (9, 9, 9, 9), 1, session=5)  # another text: what is kept does not change
        await engine.close(name(5))
        assert await answer(6, (4, 7, 11), 7) == expected


async def _check_rows_of_answers_are_not_kept(make: Make) -> None:
    async with make(0, 4) as engine:
        await enter(engine, 1, capacity=20, prompt=PROMPT, prefixes=_beginnings(4, 7, 11))
        await say(engine, PROMPT[:6])
        for position in range(6, 11):
            await say(engine, PROMPT[position : position + 1], position, prefill=False)
        await engine.close(name(1), keep=True)
        assert await enter(engine, 2, capacity=20, prefixes=_beginnings(4, 7, 11)) == 4
        await engine.close(name(2))
        await enter(engine, 3, capacity=20, prompt=PROMPT, prefixes=_beginnings(5))
        await say(engine, PROMPT, session=3)
        await say(engine, (9,), 3, session=3, prefill=False)  # rewound to 3, and on as an answer
        await engine.close(name(3), keep=True)
        assert await enter(engine, 4, capacity=20, prefixes=_beginnings(5)) == 0


async def _check_kept_rows_give_way(make: Make) -> None:
    async with make(0, 4) as engine:
        arch = engine.spec.architecture
        per_token = 4 * 2 * arch.kv_heads * arch.head_dim * 4
        expected = await generate([engine], 1)
    async with make(0, 4, max_kv_bytes=per_token * 20) as engine:
        for session, end in ((1, 8), (2, 9)):
            await enter(engine, session, capacity=11, prompt=PROMPT, prefixes=_beginnings(end))
            await say(engine, PROMPT, session=session)
            await engine.close(name(session), keep=True)
        assert engine.kept_bytes == per_token * 17
        await enter(engine, 3, capacity=5)
        assert engine.kept_bytes == per_token * 9, "the oldest goes"
        await engine.close(name(3))
        assert await enter(engine, 4, capacity=18, prompt=PROMPT, prefixes=_beginnings(9)) == 9
        assert engine.kept_bytes == 0, "where both have no room, the session takes the rows with it"
        assert (await say(engine, PROMPT[9:], 9, session=4)).token == expected[0]
        await engine.close(name(4), keep=True)
        assert engine.kept_bytes == per_token * 9
        await enter(engine, 5, capacity=20)
        assert engine.kept_bytes == 0


async def _check_stop(make: Make) -> None:
    async with make(0, 4) as engine:
        await engine.stop()
        assert "stopped" in await engine.wait_lost()
        assert engine.rss_bytes == 0
        with pytest.raises(EngineLost, match="stopped"):
            await say(engine, (1,))
        await engine.close(name(1))
        await engine.stop()


CHECKS = tuple(check for name, check in list(globals().items()) if name.startswith("_check_"))


def changed(spec: StageSpec, **fields: object) -> StageSpec:
    return dataclasses.replace(spec, **fields)  # type: ignore[arg-type]


@asynccontextmanager
async def running(spec: StageSpec, deadlines: Deadlines | None = None) -> AsyncIterator[EngineProcess]:
    """An engine in a process of its own, for as long as the block lasts."""
    engine = EngineProcess(spec, deadlines=deadlines)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
