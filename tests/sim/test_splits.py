"""Meshes that are split, and nodes that leave: in virtual time."""

from __future__ import annotations

import time

import pytest
import trio
from trio.testing import MockClock

from meshnode.sim.model import ModelSpec
from meshnode.sim.world import World


async def test_a_mesh_that_lacks_layers_waits_without_work(world: World, autojump_clock: MockClock) -> None:
    world.add(3, memory="1.4MB")
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    world.split(["n1"], ["n2", "n3"])
    began = time.perf_counter()
    await trio.sleep(60)
    assert time.perf_counter() - began < 15, "a loop spins while layers are held by nobody"
    assert not world.all_ready()
    world.network.heal()
    await world.until(lambda: world.connected() and world.all_ready())


async def test_a_node_ends_the_sessions_of_its_old_span_before_it_leaves(
    world: World, autojump_clock: MockClock
) -> None:
    world.engine_step_s = 0.005
    world.add(4, memory="4MB")
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    expected = await world.ask("n1", max_tokens=500)
    async with trio.open_nursery() as nursery:
        answers: list[list[int]] = []

        async def ask(name: str) -> None:
            answers.append(await world.ask(name, max_tokens=500))

        for name in ("n1", "n2", "n3"):
            nursery.start_soon(ask, name)
        busy = [device for device in world.devices.values() if device.name != "n1"]
        await world.until(lambda: any(device.running.load.sessions for device in world.devices.values()))
        await world.publish("n1", ModelSpec(name="other", layers=12))
        await world.until(
            lambda: all(
                (span := device.running.spans.serving) is not None
                and device.running.releases.current is not None
                and device.running.releases.current.layers_of(span.span) is not None
                for device in world.devices.values()
            )
        )
        assert not answers, "the questions still run on the old spans"
        leaver = next(device for device in reversed(busy) if device.running.load.sessions)
        await world.leave(leaver.name)
    assert answers == [expected] * 3


@pytest.mark.parametrize("memory", ["16MB", "2.5MB"])
async def test_no_question_fails_while_the_mesh_goes_over_to_another_model(
    memory: str, world: World, autojump_clock: MockClock
) -> None:
    """With memory for both, and with memory for one."""
    world.engine_step_s = 0.01
    world.engine_load_s = 8.0
    world.add(3, memory=memory)
    await world.start_all()
    await world.publish("n1", ModelSpec(layers=12, layer_bytes=200_000))
    await world.until(world.all_ready)
    expected = await world.ask("n1", max_tokens=40)
    took: list[float] = []
    unready: list[str] = []
    over = trio.Event()

    async def ask_on(name: str) -> None:
        while not over.is_set():
            began = trio.current_time()
            assert await world.ask(name, max_tokens=40) == expected
            took.append(trio.current_time() - began)

    async def watch() -> None:
        while not over.is_set():
            await trio.sleep(0.1)
            unready.extend(d.name for d in world.devices.values() if not d.running.readiness.now.ready)

    async with trio.open_nursery() as nursery:
        for name in ("n1", "n2", "n3"):
            nursery.start_soon(ask_on, name)
        nursery.start_soon(watch)
        await trio.sleep(5)
        new = await world.publish("n2", ModelSpec(layers=12, layer_bytes=200_000, seed=8))

        def gone_over() -> bool:
            spans = [device.running.spans.serving for device in world.devices.values()]
            return all(span is not None and span.span.manifest == new for span in spans)

        await world.until(gone_over)
        await trio.sleep(5)
        over.set()
    if memory == "16MB":
        assert max(took) < 3, "nobody waits for what is loaded beside"
        assert not unready
