"""A node and its control commands, in-process: real nodes in virtual time."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any, NoReturn

import pytest
import trio
from trio.testing import MockClock

from meshnode.api.commands import Commands
from meshnode.cli.status import describe
from meshnode.core.errors import BadRequest, Declined, EngineLost, ModelError
from meshnode.embed import LocalNode
from meshnode.sim.model import ModelSpec
from meshnode.sim.world import World
from tests.sim.coverage import span_of


def library(world: World, name: str) -> LocalNode:
    """What a program that embeds this node sees."""
    node = world[name].running
    return LocalNode(node, Commands(node))


async def mesh(world: World, nodes: int = 3, memory: str = "1.4MB") -> list[int]:
    """Nodes that serve the model together; their answer to the usual question."""
    world.add(nodes, memory=memory)
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    return await world.ask("n1")


async def test_status_tells_who_serves_what(world: World, autojump_clock: MockClock) -> None:
    await mesh(world)
    status = await library(world, "n2").status()
    assert status.ready
    assert status.model is not None and status.model.name == "noise"
    assert status.me.name == "n2"
    assert {peer.name for peer in status.peers} == {"n1", "n3"}
    spans = sorted((peer.first, peer.last) for peer in (status.me, *status.peers))
    assert spans[0][0] == 0 and spans[-1][1] == 24
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))


async def test_every_node_gives_the_answer_of_a_lone_one(world: World, autojump_clock: MockClock) -> None:
    """Greedy and drawn, and when all ask at once."""
    drawn: dict[str, Any] = {"max_tokens": 40, "temperature": 0.8, "top_p": 0.9, "seed": 99}
    async with World.open(0) as other:
        right = await mesh(other, nodes=1, memory="8MB")
        me = (await library(other, "n1").status()).me
        assert (me.first, me.last) == (0, 24)
        right_drawn = list((await library(other, "n1").generate([5, 6, 7], **drawn)).token_ids)
    assert await mesh(world) == right
    answers: list[list[int]] = []

    async def ask(name: str) -> None:
        answer = await library(world, name).generate([5, 6, 7], **drawn)
        assert list(answer.token_ids) == right_drawn
        assert len(answer.receipt.route) == 3
        answers.append(await world.ask(name))

    async with trio.open_nursery() as nursery:
        for name in world.devices:
            nursery.start_soon(ask, name)
    assert answers == [right] * 3


async def test_a_stream_that_is_closed_frees_every_stage(world: World, autojump_clock: MockClock) -> None:
    await mesh(world)
    async with library(world, "n1") as node:
        pieces = node.stream([5, 6, 7], max_tokens=2000, temperature=0)
        for _ in range(3):
            await anext(pieces)
        assert (await node.status()).sessions == 1
        await pieces.aclose()
        assert (await node.status()).sessions == 0
        await world.until(lambda: all(device.running.load.sessions == 0 for device in world.up))
        assert pieces.answer is None
        left = node.stream([5, 6, 7], max_tokens=2000, temperature=0)
        await anext(left)
    assert (await node.status()).sessions == 0, "leaving the block closes what still streams"


async def test_a_question_is_checked_before_it_is_asked(world: World, autojump_clock: MockClock) -> None:
    await mesh(world, nodes=1, memory="8MB")
    with pytest.raises(BadRequest, match="temperature is 99; it takes a number from 0 to 10"):
        library(world, "n1").stream("w1", temperature=99)


async def test_without_a_model_everything_is_refused_with_what_to_do(world: World, autojump_clock: MockClock) -> None:
    world.add(2)
    await world.start_all()
    node = library(world, "n1")
    with pytest.raises(Declined, match="not ready after 5 s: the network serves no model yet"):
        await node.wait_ready(5)
    with pytest.raises(Declined, match="meshnode model add"):
        await world.ask("n1")
    with pytest.raises(ModelError, match="has no model 'nothing'; it has: none"):
        await node.serve("nothing")


async def test_nobody_is_ready_without_a_model(world: World, autojump_clock: MockClock) -> None:
    """Also when a probe token came back a moment ago, from the model that was taken back since."""
    await mesh(world)
    node = library(world, "n1")
    await node.retract()
    await world.until(lambda: world["n1"].running.releases.current is None)
    status = await node.status()
    assert (status.ready, status.model) == (False, None)
    said = describe(status)
    assert "no model\n" in said and "not ready: the network serves no model; `meshnode model list` shows" in said


async def test_a_receipt_names_the_model(world: World, autojump_clock: MockClock) -> None:
    await mesh(world)
    receipt = (await library(world, "n2").generate([5, 6, 7], max_tokens=2)).as_json()
    served = world["n2"].running.releases.current
    assert served is not None
    assert receipt["model"] == {
        "name": "noise",
        "version": served.manifest.version,
        "manifest": served.cid,
        "variant": "int4",
        "layers": 24,
    }


async def test_a_model_is_served_by_its_name(world: World, autojump_clock: MockClock) -> None:
    first = await mesh(world, memory="4MB")
    await world.publish("n1", ModelSpec(name="other", layers=12))
    await world.until(lambda: world.all_ready() and world["n3"].running.releases.current.manifest.name == "other")
    assert await world.ask("n1") != first
    node = library(world, "n3")
    with pytest.raises(ModelError, match="has no variant int8; it has int4"):
        await node.serve("noise", variant="int8")
    await node.serve("noise")
    await world.until(lambda: world.all_ready() and world["n1"].running.releases.current.manifest.name == "noise")
    assert await world.ask("n2") == first


@pytest.mark.parametrize("victim", ["n1", "n2"])
async def test_an_answer_goes_on_when_an_engine_that_died_is_started_again(
    world: World, autojump_clock: MockClock, victim: str
) -> None:
    """The one of the node that was asked, which sees it end, and another one, in the middle of a step."""

    async def dies(*_: object, **__: object) -> NoReturn:
        raise EngineLost("it was killed by SIGKILL")

    await mesh(world)
    node = library(world, "n1")
    right = (await node.generate([5, 6, 7], max_tokens=30, temperature=0)).token_ids
    pieces = node.stream([5, 6, 7], max_tokens=30, temperature=0)
    tokens = [(await anext(pieces)).token for _ in range(3)]
    engine = world[victim].engines[-1]
    if victim == "n1":
        engine.lose("it was killed by SIGKILL")
    else:
        engine.step = dies  # type: ignore[method-assign]
    tokens += [piece.token async for piece in pieces]
    answer = pieces.answer
    assert answer is not None
    assert tokens == list(right) == list(answer.token_ids)
    (replaced,) = answer.receipt.replaced
    assert replaced.peer == world[victim].peer_id
    assert 3 <= replaced.tokens < 30 and 0 < replaced.gap_ms < 15_000 and replaced.at_ms > 0
    assert "failed: " in replaced.reason
    assert len(world[victim].engines) == 2


@pytest.mark.parametrize("blow", ["crash", "leave"])
async def test_an_answer_goes_on_when_a_node_of_its_route_is_lost(
    world: World, autojump_clock: MockClock, blow: str
) -> None:
    """The others have room for its layers, and take them over while the answer waits."""
    await mesh(world, nodes=4, memory="1.9MB")
    node = library(world, "n1")
    drawn: dict[str, Any] = {"max_tokens": 60, "temperature": 0.8, "seed": 99}
    right = (await node.generate([5, 6, 7], **drawn)).token_ids
    pieces = node.stream([5, 6, 7], **drawn)
    tokens = [(await anext(pieces)).token for _ in range(5)]
    (generation,) = world["n1"].running.origin._running.values()
    peer = next(hop.peer for hop in generation.receipt.route if hop.peer != world["n1"].peer_id)
    victim = next(name for name, device in world.devices.items() if device.peer_id == peer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.crash if blow == "crash" else world.leave, victim)
        tokens += [piece.token async for piece in pieces]
    assert tokens == list(right)
    assert pieces.answer is not None
    assert {lost.peer for lost in pieces.answer.receipt.replaced} <= {peer}
    assert pieces.answer.receipt.replaced or blow == "leave", "one that leaves may hand over in time"
    await world.until(world.all_ready)


async def test_questions_go_on_while_a_node_leaves_between_two_of_them(autojump_clock: MockClock) -> None:
    """One that begins in the very moment finds its stage gone and no other one known yet: it waits for the news."""
    async with World.open(1) as world:  # the seed of a mesh in which it happens
        spec = ModelSpec()
        for layers in (3, 4, 5, 6, 7):
            world.add(memory=f"{layers * spec.layer_bytes * 2 + 60_000}B")
        await world.start_all()
        await world.publish("n1")
        await world.until(lambda: world.all_ready())
        right = await world.ask("n1")
        (sixth,) = world.add(memory=f"{9 * spec.layer_bytes * 2 + 60_000}B")
        await world.start(sixth.name)
        await world.until(lambda: span_of(sixth) is not None and world.all_ready())
        left = trio.Event()

        async def ask() -> None:
            while not left.is_set():
                assert await world.ask("n1") == right

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await world.leave("n5")
            left.set()
        await world.until(world.all_ready)


@pytest.mark.long
async def test_a_further_node_helps_and_one_that_leaves_hands_over_while_questions_run(
    world: World, autojump_clock: MockClock
) -> None:
    spec = ModelSpec()
    for layers in (3, 4, 5, 6, 7):  # room for 25 of its 24 layers: every node is needed
        world.add(memory=f"{layers * spec.layer_bytes * 2 + 60_000}B")
    await world.start_all()
    await world.publish("n1")
    await world.until(lambda: world.all_ready())
    right = await world.ask("n1", max_tokens=200)
    (sixth,) = world.add(memory=f"{9 * spec.layer_bytes * 2 + 60_000}B")
    await world.start(sixth.name)
    await world.until(lambda: span_of(sixth) is not None and world.all_ready())
    counts = Counter(layer for device in world.up for layer in range(*(span_of(device) or (0, 0))))
    alone = [d for d in world.up[1:] if any(counts[layer] == 1 for layer in range(*(span_of(d) or (0, 0))))]
    leaver = alone[-1]
    left = trio.Event()

    async def ask() -> None:
        while not left.is_set():
            assert await world.ask("n1", max_tokens=200) == right

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await world.until(lambda: leaver.running.load.sessions > 0)
        await world.leave(leaver.name)
        left.set()
    await world.until(world.all_ready)
    assert await world.ask("n1", max_tokens=200) == right
