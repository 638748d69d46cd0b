"""A world of whole nodes. Its tests take `autojump_clock` themselves: pytest-trio looks for a clock nowhere else."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from meshnode.sim.world import World
from tests.conftest import SEED
from tests.sim.coverage import Coverage, covering


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World.open(SEED) as made:
        yield made


@pytest.fixture
async def mesh() -> AsyncIterator[Coverage]:
    async with covering(1) as made:
        yield made
