"""The null engine passes the conformance suite of the port, in a real child process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from meshnode.engine.port import Engine, StageSpec
from meshnode.engine.process import EngineProcess
from protocols.manifest.messages import Architecture
from tests.conformance.check_engine import CHECKS, changed

ARCHITECTURE = Architecture(
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
SPEC = StageSpec(
    kind="null",
    graph=Path("none"),
    groups={},
    first=0,
    last=4,
    architecture=ARCHITECTURE,
    threads=1,
    max_sessions=8,
    max_kv_bytes=1 << 30,
)


@asynccontextmanager
async def make(first: int, last: int, **fields: object) -> AsyncIterator[Engine]:
    engine = EngineProcess(changed(SPEC, first=first, last=last, **fields))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("_check_"))
async def test_conformance(check: object) -> None:
    await check(make)  # type: ignore[operator]
