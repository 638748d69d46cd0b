"""The ONNX engine passes the conformance suite of the port, in a real child process, with a small random model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from meshnode.engine.port import Engine
from meshnode.engine.process import EngineProcess
from tests.conformance.check_engine import CHECKS, changed
from tests.conformance.tiny_model import tiny_models

SHAPES = ("_check_cuts_agree", "_check_part_of_a_span", "_check_rewind")  # what depends on the kernels
CASES = [("int4", check) for check in CHECKS]
CASES += [(variant, check) for variant in ("fp32", "int8") for check in CHECKS if check.__name__ in SHAPES]


@pytest.mark.parametrize(("variant", "check"), CASES, ids=lambda c: getattr(c, "__name__", c))
async def test_conformance(variant: str, check: object) -> None:
    @asynccontextmanager
    async def make(first: int, last: int, **fields: object) -> AsyncIterator[Engine]:
        engine = EngineProcess(changed(tiny_models()[variant].spec(first, last), **fields))
        await engine.start()
        try:
            yield engine
        finally:
            await engine.stop()

    await check(make)  # type: ignore[operator]
