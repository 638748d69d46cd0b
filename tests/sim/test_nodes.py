"""A node and its control commands, in-process: real nodes in virtual time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

import pytest

from meshnode.api.commands import Orders
from meshnode.core.errors import Declined
from meshnode.sim.model import ModelSpec
from meshnode.sim.world import World
from protocols.ids import DAG_CBOR, cid_of
from tests.conftest import SEED

pytestmark = pytest.mark.usefixtures("autojump_clock")


async def ask(
    world: World, name: str, command: str, request: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """All answers of a control command."""
    async with aclosing(Orders(world[name].running).commands()[command](dict(request or {}))) as answers:
        return [answer async for answer in answers]


async def mesh(world: World, nodes: int = 3, memory: str = "1.4MB") -> list[int]:
    """Nodes that serve the model together; their answer to the usual question."""
    world.add(nodes, memory=memory)
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    return await world.ask("n1")


async def test_status_tells_who_serves_what() -> None:
    async with World.open(SEED) as world:
        await mesh(world)
        (answer,) = await ask(world, "n2", "status")
        status = answer["done"]
        assert status["ready"]
        assert status["model"]["name"] == "noise"
        assert status["me"]["name"] == "n2"
        assert {peer["name"] for peer in status["peers"]} == {"n1", "n3"}
        spans = sorted((line["first"], line["last"]) for line in (status["me"], *status["peers"]))
        assert spans[0][0] == 0 and spans[-1][1] == 24
        assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))


async def test_every_node_gives_the_same_answer() -> None:
    async with World.open(SEED) as world:
        answer = await mesh(world)
        for name in world.devices:
            request = {"token_ids": [5, 6, 7], "max_tokens": 12, "temperature": 0.0}
            *pieces, last = await ask(world, name, "generate", request)
            assert last["done"]["token_ids"] == answer
            assert [piece["token"] for piece in pieces if "token" in piece] == answer
            assert len(last["done"]["route"]) == 3


async def test_a_lone_node_answers_alone_and_says_so() -> None:
    async with World.open(SEED) as world:
        answer = await mesh(world, nodes=1, memory="8MB")
        assert len(answer) == 12
        (status,) = await ask(world, "n1", "status")
        assert (status["done"]["me"]["first"], status["done"]["me"]["last"]) == (0, 24)


async def test_without_a_model_a_question_is_refused_with_what_to_do() -> None:
    async with World.open(SEED) as world:
        world.add(2)
        await world.start_all()
        with pytest.raises(Declined, match="meshnode model add"):
            await world.ask("n1")


async def test_a_node_that_died_comes_back_with_its_files_and_serves_again() -> None:
    async with World.open(SEED) as world:
        answer = await mesh(world)
        fetched = world["n3"].running.content.bytes_fetched
        assert fetched > 0
        await world.crash("n3")
        await world.until(lambda: not world.all_ready())
        await world.start("n3")
        await world.until(lambda: world.connected() and world.all_ready())
        assert world["n3"].running.content.bytes_fetched == 0, "what it had fetched was on its disk"
        assert await world.ask("n3") == answer


async def test_an_engine_that_dies_is_started_again() -> None:
    async with World.open(SEED) as world:
        answer = await mesh(world)
        world["n2"].engines[-1].lose("it was killed by SIGKILL")
        await world.until(lambda: len(world["n2"].engines) == 2 and world.all_ready())
        assert await world.ask("n3") == answer


async def test_the_newest_model_is_served() -> None:
    async with World.open(SEED) as world:
        first = await mesh(world, memory="4MB")
        await world.publish("n2", ModelSpec(name="other", layers=12))
        await world.until(lambda: world.all_ready() and world["n3"].running.served().manifest.name == "other")
        assert await world.ask("n1") != first


async def test_announcing_what_is_not_here_is_declined() -> None:
    async with World.open(SEED) as world:
        world.add()
        await world.start_all()
        with pytest.raises(Declined, match="not in this node's store"):
            await ask(world, "n1", "announce", {"manifest": cid_of(DAG_CBOR, b"nothing"), "variant": ""})
