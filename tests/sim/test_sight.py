"""What the nodes of a route get to see of a question: docs/trust.md says it, so it must stay true."""

from __future__ import annotations

import struct
from collections import defaultdict
from typing import Any

from trio.testing import MockClock

from meshnode.sim.world import World
from protocols.pipe.messages import Open, Step

PROMPT = (5, 6, 7, 11, 13)


def ids(body: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(body) // 4}i", body) if len(body) % 4 == 0 else ()


async def test_the_ends_of_a_route_see_tokens_the_middle_hidden_states_and_others_nothing(
    world: World, autojump_clock: MockClock
) -> None:
    world.add(3, memory="1.4MB")
    (asker, bystander) = world.add(2, memory="0B")
    await world.start_all()
    await world.publish("n1")
    await world.until(lambda: world.all_ready() and world.connected())
    release = asker.running.releases.current
    route = asker.running.origin._router.usual()
    assert release is not None and isinstance(route, tuple) and len(route) == 3
    opened: defaultdict[str, list[bytes]] = defaultdict(list)
    steps: defaultdict[str, list[bytes]] = defaultdict(list)

    def watch(name: str) -> None:
        handlers = world[name].running.pipes._handlers

        def spied(kind: type, kept: defaultdict[str, list[bytes]]) -> None:
            usual = handlers[kind]

            def take(peer: Any, message: Any, body: bytes, network_us: int) -> None:
                origin = message.origin if isinstance(message, Open) else None
                if origin in (None, asker.peer_id):
                    kept[world[name].peer_id].append(body)
                usual(peer, message, body, network_us)

            handlers[kind] = take

        spied(Open, opened)
        spied(Step, steps)

    for device in world.up:
        watch(device.name)
    answer = await world.ask(asker.name, PROMPT, max_tokens=6)
    first, middle, last = (hop.peer for hop in route)
    seen = [token for body in steps[first] for token in ids(body)]
    assert seen[: len(PROMPT)] == list(PROMPT) and seen[len(PROMPT) :] == answer[:-1], (
        "the first: all but the last token"
    )
    assert ids(opened[last][-1]) == PROMPT, "the last: the prompt, and the answer, which it chooses"
    assert opened[middle] == [b""] and opened[first] == [b""]
    rows = {len(body) for peer in (middle, last) for body in steps[peer]}
    width = 4 * release.manifest.architecture.hidden
    assert rows and all(size % width == 0 and size >= width for size in rows), "hidden states"
    assert bystander.peer_id not in steps and bystander.peer_id not in opened
