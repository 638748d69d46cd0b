"""Runs a scenario in virtual time, the same way each time for the same seed.

trio shuffles the tasks that can run at the same moment. Here it does so by the seed: other seeds are other orders.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import structlog
import trio
import trio.testing
from trio._core import _run as scheduler

from meshnode.sim.world import World

Result = TypeVar("Result")


def simulate(scenario: Callable[[World], Awaitable[Result]], seed: int) -> tuple[Result, list[str]]:
    """Run `scenario(world)` to its end. Returns what it returned and the trace: what the nodes logged, with virtual
    times, one line each.

    Raises what the scenario raises, and whatever ends a node. Not inside another trio run.
    """
    trace: list[str] = []

    async def main() -> Result:
        async with World.open(seed) as world:
            return await scenario(world)

    with _ordered(seed), _traced(trace):
        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0)), trace


@contextmanager
def _ordered(seed: int) -> Iterator[None]:
    """trio's scheduler draws from a known generator (what its plugin for hypothesis does, too)."""
    module: Any = scheduler
    before, generator = module._ALLOW_DETERMINISTIC_SCHEDULING, module._r
    module._ALLOW_DETERMINISTIC_SCHEDULING, module._r = True, random.Random(seed)
    try:
        yield
    finally:
        module._ALLOW_DETERMINISTIC_SCHEDULING, module._r = before, generator


@contextmanager
def _traced(trace: list[str]) -> Iterator[None]:
    """Everything that the nodes log goes into the trace."""

    def record(_logger: object, method: str, event: Any) -> Any:
        shown = sorted((name, value) for name, value in event.items() if name not in ("event", "node"))
        facts = " ".join(f"{name}={value!r}" for name, value in shown)
        trace.append(f"{trio.current_time():.6f} {event.get('node', '-')} {event['event']} {facts}".rstrip())
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, record],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        cache_logger_on_first_use=False,
    )
    try:
        yield
    finally:
        structlog.configure(**before)
