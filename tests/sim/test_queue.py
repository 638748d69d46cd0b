"""Many questions at once: they wait in turn, nobody takes everything, and a busy mesh is no broken one."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import Declined
from meshnode.services.inference.queue import MAX_WAITING
from meshnode.sim.world import World


@pytest.mark.parametrize("count", [20, 100])
async def test_all_questions_at_once_are_answered_in_turn(
    world: World, count: int, autojump_clock: MockClock
) -> None:
    world.add(3, memory="4MB")
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    prompts = [(5, 6, 7 + number) for number in range(count)]
    expected = {prompt: await world.ask("n1", prompt) for prompt in prompts[:5]}
    got: dict[tuple[int, ...], list[int]] = {}
    unready: list[str] = []

    async def ask(name: str, prompt: tuple[int, ...]) -> None:
        got[prompt] = await world.ask(name, prompt)

    async def watch() -> None:
        for device in world.devices.values():
            readiness = device.running.readiness
            if not readiness.now.ready:
                unready.append(readiness.now.sentence)

    async with trio.open_nursery() as nursery:
        for number, prompt in enumerate(prompts):
            nursery.start_soon(ask, f"n{1 + number % 3}", prompt)
        nursery.start_soon(watch)
    assert len(got) == count
    assert all(got[prompt] == tokens for prompt, tokens in expected.items())
    assert not unready


async def test_beyond_the_bound_a_question_is_told_when_to_come_again(
    world: World, autojump_clock: MockClock
) -> None:
    world.engine_step_s = 0.05
    world.add(1, memory="64MB")
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    refused: list[Declined] = []
    answered: list[list[int]] = []

    async def ask() -> None:
        try:
            answered.append(await world.ask("n1", max_tokens=4))
        except Declined as error:
            refused.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(MAX_WAITING + 20):
            nursery.start_soon(ask)
    assert refused
    assert all(error.code == "busy" and error.retry_ms > 0 for error in refused)
    assert len(answered) + len(refused) == MAX_WAITING + 20
    assert len(answered) >= MAX_WAITING
