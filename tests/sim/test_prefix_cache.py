"""Whole nodes: a chat that goes on, a stage that dies, and memory that is wanted for something else."""

from __future__ import annotations

from contextlib import aclosing

import trio
from trio.testing import MockClock

from meshnode.services.inference.receipt import Receipt
from meshnode.sim.world import World
from meshnode.text.question import Question

FIRST = tuple(3 + i * 7 % 50 for i in range(150))


async def ask(world: World, name: str, prompt: tuple[int, ...]) -> Receipt:
    question = Question(token_ids=prompt, max_tokens=8, temperature=0)
    async with aclosing(world.devices[name].running.text.answer(question)) as pieces:
        receipts = [piece async for piece in pieces if isinstance(piece, Receipt)]
    await trio.sleep(1)  # until the stages have heard of the end
    return receipts[0]


async def test_a_chat_goes_on_over_whole_nodes(world: World, autojump_clock: MockClock) -> None:
    world.add(3, memory="1400KB")
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    prompt, cached = FIRST, 0
    for _ in range(3):
        receipt = await ask(world, "n2", prompt)
        assert len(receipt.route) > 1
        assert receipt.cached == cached
        cached, prompt = len(prompt), (*prompt, *receipt.tokens, 7, 7)
    cold = await ask(world, "n3", receipt.prompt)
    assert (cold.cached, cold.tokens) == (0, receipt.tokens), (
        "what was kept changes no token, and helps its asker alone"
    )


async def test_a_stage_that_died_has_kept_nothing(world: World, autojump_clock: MockClock) -> None:
    world.add(4, memory="1400KB")
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    before = await ask(world, "n1", FIRST)
    assert (await ask(world, "n1", FIRST)).cached == len(FIRST) - 1
    peer = next(hop.peer for hop in before.route if hop.peer != world["n1"].peer_id)
    (lost,) = [device.name for device in world.up if device.peer_id == peer]
    await world.crash(lost)
    await world.until(lambda: world["n1"].running.readiness.now.ready, within_s=300)
    after = await ask(world, "n1", FIRST)
    assert after.route != before.route
    assert (after.cached, after.tokens) == (0, before.tokens)
    assert (await ask(world, "n1", FIRST)).cached == len(FIRST) - 1


async def test_what_is_kept_gives_way_to_sessions(world: World, autojump_clock: MockClock) -> None:
    """More prompts than the engines have memory for: each is answered, and none is refused for what is kept."""
    world.add(1, memory="64MB")
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    (engine,) = [engine for engine in world["n1"].engines if engine.rss_bytes]
    most = 0
    for number in range(40):
        receipt = await ask(world, "n1", (3 + number % 50, 4 + number // 50) * 1000)
        assert (len(receipt.tokens), receipt.cached) == (8, 0)
        most = max(most, engine.kept_bytes)
        assert engine.kept_bytes <= engine.spec.max_kv_bytes
    assert most > engine.spec.max_kv_bytes // 2, "the memory was never full"
    again = await ask(world, "n1", receipt.prompt)
    assert again.cached == len(receipt.prompt) - 1, "the last one is there"
