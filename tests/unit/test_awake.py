"""A clock that stands still while the event loop does."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.awake import LATE_S, TICK_S, AwakeClock


async def test_it_goes_as_trio_s_while_the_loop_runs(autojump_clock: MockClock) -> None:
    clock = AwakeClock()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(clock.run)
        began, real = clock.now(), trio.current_time()
        for _ in range(50):
            await trio.sleep(0.3)
            assert clock.now() - began == pytest.approx(trio.current_time() - real, abs=1e-6)
        nursery.cancel_scope.cancel()


async def test_what_the_loop_could_not_see_does_not_count(mock_clock: MockClock) -> None:
    clock = AwakeClock()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(clock.run)
        await trio.testing.wait_all_tasks_blocked()
        began = clock.now()
        mock_clock.jump(60)  # a machine that swaps
        assert clock.now() - began <= TICK_S + LATE_S, "also for whoever looks before the clock has ticked"
        await trio.testing.wait_all_tasks_blocked()
        assert clock.now() - began <= TICK_S + LATE_S
        for _ in range(4):
            mock_clock.jump(TICK_S)
            await trio.testing.wait_all_tasks_blocked()
        assert clock.now() - began == pytest.approx(5 * TICK_S + LATE_S)
        assert clock.real(clock.now()) == pytest.approx(trio.current_time())
        nursery.cancel_scope.cancel()
