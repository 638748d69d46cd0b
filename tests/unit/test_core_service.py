from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.clock import VirtualWall, monotonic
from meshnode.core.errors import ConfigError, EngineLost, MeshError
from meshnode.core.supervise import Restart, supervise


class Flaky:
    """Fails as often as told, then runs until cancelled."""

    name = "flaky"

    def __init__(self, failures: int, *, error: Callable[[], Exception], runs_s: float = 0.0) -> None:
        self.failures = failures
        self.error = error
        self.runs_s = runs_s
        self.starts: list[float] = []
        self.settled = trio.Event()  # it runs and will not fail again

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self.starts.append(trio.current_time())
        async with trio.open_nursery():
            task_status.started()
            if len(self.starts) <= self.failures:
                await trio.sleep(self.runs_s)
                raise self.error()
            self.settled.set()
            await trio.sleep_forever()


def lost() -> EngineLost:
    return EngineLost("The engine was killed.")


async def test_a_transient_failure_is_run_again_with_growing_pauses(autojump_clock: MockClock) -> None:
    service = Flaky(3, error=lost)
    async with trio.open_nursery() as nursery:
        with trio.fail_after(60):
            await nursery.start(supervise, service, Restart(first=1.0, cap=2.0))
            await service.settled.wait()
        nursery.cancel_scope.cancel()
    began = service.starts[0]
    assert [round(t - began, 3) for t in service.starts] == [0, 1, 3, 5]


async def test_it_gives_up_after_the_limit(autojump_clock: MockClock) -> None:
    service = Flaky(99, error=lost)
    with pytest.raises(BaseExceptionGroup) as caught:
        await supervise(service, Restart(limit=3))
    assert caught.group_contains(EngineLost)
    assert len(service.starts) == 3


async def test_a_healthy_run_forgets_earlier_failures(autojump_clock: MockClock) -> None:
    service = Flaky(20, error=lost, runs_s=121)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervise, service, Restart(limit=2))
        with trio.fail_after(20 * 130):
            await service.settled.wait()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("error", [lambda: KeyError("bug"), lambda: ConfigError("port"), lambda: MeshError("other")])
async def test_bugs_and_fatal_errors_pass_through(autojump_clock: MockClock, error: Callable[[], Exception]) -> None:
    service = Flaky(1, error=error)
    with pytest.raises(BaseExceptionGroup) as caught:
        await supervise(service)
    assert caught.group_contains(type(error()))
    assert len(service.starts) == 1


async def test_a_bug_beside_a_transient_failure_passes_through(autojump_clock: MockClock) -> None:
    def both() -> Exception:
        return ExceptionGroup("both", [lost(), KeyError("bug")])

    with pytest.raises(BaseExceptionGroup) as caught:
        await supervise(Flaky(1, error=both))
    assert caught.group_contains(KeyError)


async def test_virtual_time_moves_both_clocks(autojump_clock: MockClock) -> None:
    wall = VirtualWall(1000, skew_ms=5)
    before = monotonic()
    await trio.sleep(3600)
    assert monotonic() - before == pytest.approx(3600)
    assert wall() == 1005 + 3_600_000
