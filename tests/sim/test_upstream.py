"""A member's own server is asked through the mesh: whole nodes in virtual time."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from meshnode.api.commands import Commands
from meshnode.api.messages import Answer, Piece
from meshnode.api.upstream import ask_upstream
from meshnode.cli.status import describe
from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.embed import LocalNode
from meshnode.http.door import NodeDoor
from meshnode.services.upstream import AT_ONCE
from meshnode.sim.world import World
from meshnode.text.question import Question
from protocols.upstream.messages import End

QUESTION = Question(messages=({"role": "user", "content": "hello"},), max_tokens=9)


class Scripted:
    """Implements `Server`: says the words of the question."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.hold: trio.Event | None = None
        self.ended = trio.Event()
        self.error: Exception | None = None

    async def answer(self, question: dict[str, Any]) -> AsyncGenerator[str | End, None]:
        self.asked.append(question)
        try:
            await trio.sleep(0.1)
            if self.error is not None:
                raise self.error
            yield "hel"
            if self.hold is not None:
                await self.hold.wait()
            yield "lo"
            yield End(reason="stop", prompt_tokens=4, tokens=2)
        finally:
            self.ended.set()


async def ask(world: World, name: str, model: str = "llama3:8b") -> Answer:
    async with aclosing(ask_upstream(world[name].running, model, QUESTION)) as events:
        told = [event async for event in events]
    answer = told[-1]
    assert isinstance(answer, Answer)
    assert "".join(event.text for event in told if isinstance(event, Piece)) == answer.text
    return answer


async def mesh(world: World, *offering: str) -> dict[str, Scripted]:
    servers = {name: Scripted() for name in offering}
    world.add(3, memory="8MB")
    for name, server in servers.items():
        world[name].upstream, world[name].offered = server, ("llama3:8b",)
    await world.start_all()
    await world.until(lambda: all(len(offers(world, name)) == len(offering) for name in world.devices))
    return servers


def offers(world: World, name: str) -> list[str]:
    return list(world[name].running.upstream.offers().get("llama3:8b", ()))


async def test_asked_through_the_mesh_by_name(world: World, autojump_clock: MockClock) -> None:
    servers = await mesh(world, "n2")
    answer = await ask(world, "n1")
    assert (answer.text, answer.reason, len(answer.token_ids), len(answer.prompt_token_ids)) == ("hello", "eos", 2, 4)
    receipt = answer.receipt
    assert (receipt.upstream, receipt.model.variant, receipt.route) == (world["n2"].peer_id, "upstream", ())
    assert servers["n2"].asked[0]["model"] == "llama3:8b"
    assert servers["n2"].asked[0]["max_tokens"] == 9
    assert (await ask(world, "n2")).text == "hello", "its own node asks it without the network"
    with pytest.raises(Declined, match="nobody who is there offers the model 'gpt"):
        await ask(world, "n1", "gpt")
    (offered,) = NodeDoor(world["n1"].running, "").models()
    assert (offered.name, offered.upstream) == ("llama3:8b", "n2")
    status = await LocalNode(world["n1"].running, Commands(world["n1"].running)).status()
    assert "upstream llama3:8b: asked by name, by a server of n2" in describe(status)


async def test_another_one_is_asked_and_words_of_a_failure_reach_the_asker(
    world: World, autojump_clock: MockClock
) -> None:
    servers = await mesh(world, "n2", "n3")
    first, second = sorted(("n2", "n3"), key=lambda name: world[name].peer_id)
    servers[first].error = Declined("no-model", "the server has no such model")
    assert (await ask(world, "n1")).receipt.upstream == world[second].peer_id
    servers[second].error = Declined("bad-request", "the prompt is too long")
    with pytest.raises(Declined, match="says: the prompt is too long"):
        await ask(world, "n1")
    await world.crash(second)
    await world.until(lambda: len(offers(world, "n1")) == 1)


async def test_who_leaves_ends_the_answer_and_too_many_are_refused(world: World, autojump_clock: MockClock) -> None:
    servers = await mesh(world, "n2")
    server = servers["n2"]
    server.hold = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(AT_ONCE):
            nursery.start_soon(ask, world, "n1")
        await world.until(lambda: len(server.asked) == AT_ONCE)
        with pytest.raises(Declined, match="answers 4 questions") as refused:
            await ask(world, "n3")
        assert refused.value.code == "busy"
        nursery.cancel_scope.cancel()
    await world.until(server.ended.is_set)
    server.hold = None
    assert (await ask(world, "n3")).text == "hello", "the places are free again"
    server.hold = trio.Event()
    async with trio.open_nursery() as nursery:
        with pytest.raises(PeerUnreachable):
            nursery.start_soon(world.crash, "n2")
            await ask(world, "n1")


async def test_an_offer_ends_with_the_setting(world: World, autojump_clock: MockClock) -> None:
    await mesh(world, "n2")
    await world.leave("n2")
    world["n2"].offered = ()
    await world.start("n2")
    await world.until(world.connected)
    await trio.sleep(5)
    assert offers(world, "n1") == offers(world, "n2") == []
