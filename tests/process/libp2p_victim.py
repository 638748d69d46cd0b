"""A process that runs one libp2p host and takes orders: one JSON object a line, answered by one line each.

Orders: {"do": "admit", "peer": id, "admitted": bool}, {"do": "connect", "peer": id,
"addresses": […]}, {"do": "peers"}, {"do": "be out of reach"}. The process ends with its standard input.
"""

from __future__ import annotations

import itertools
import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import psutil
import trio

from meshnode.core.errors import PeerUnreachable
from meshnode.core.log import set_up
from meshnode.net.libp2p.host import Libp2pHost, open_host
from meshnode.net.port import Lane, Stream
from protocols.ids import PeerId
from tests.gossip import inbox_of

ROOT: Final = Path(__file__).parents[2]
ECHO: Final = "/victim/echo/1"
PUBLIC: Final = "/victim/public/1"
COUNT: Final = "/victim/count/1"
RAISE: Final = "/victim/raise/1"
NEVER: Final = "/victim/never/1"
PAUSE: Final = "/victim/pause/1"
TOPIC: Final = "/victim/topic"
PAUSE_S: Final = 6.0


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(1 << 18):
        await stream.send_all(data)


async def count(stream: Stream) -> None:
    size = 0
    while data := await stream.receive_some(1 << 18):
        size += len(data)
    await stream.send_all(b"%d" % size)


async def fail(stream: Stream) -> None:
    await stream.receive_some()
    raise ValueError("a bug in a handler")


async def never(stream: Stream) -> None:
    await trio.sleep_forever()


async def pause(stream: Stream) -> None:
    await trio.sleep(PAUSE_S)
    await count(stream)


async def obey(host: Libp2pHost, order: dict[str, Any]) -> object:
    match order["do"]:
        case "admit":
            host.admit(PeerId(order["peer"]), order["admitted"])
        case "connect":
            await host.connect(PeerId(order["peer"]), order["addresses"])
        case "peers":
            return host.peers
        case "be out of reach":
            host.port_of = lambda _: 1  # type: ignore[method-assign]
    return "done"


async def main() -> None:
    set_up(level="info", format="json")
    host = open_host(bytes.fromhex(sys.argv[1]))
    handlers = {ECHO: echo, COUNT: count, RAISE: fail, NEVER: never, PAUSE: pause}
    for protocol, handler in handlers.items():
        host.handle(protocol, handler)
    host.handle(PUBLIC, echo, open_to_strangers=True)
    inbox = inbox_of(host, TOPIC)

    async def gossip_back() -> None:
        async for _, data in inbox:
            await host.publish(TOPIC, b"heard " + data)

    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        nursery.start_soon(gossip_back)
        hello = {"peer": host.peer_id, "addresses": host.addresses}
        await trio.to_thread.run_sync(print, json.dumps(hello))
        while True:
            sys.stdout.flush()
            line = await trio.to_thread.run_sync(sys.stdin.readline)
            if not line:
                break
            answer = json.dumps(await obey(host, json.loads(line)))
            await trio.to_thread.run_sync(print, answer)
        nursery.cancel_scope.cancel()


class Victim:
    """The process, seen from a test."""

    def __init__(self, seed: bytes) -> None:
        command = (sys.executable, "-m", "tests.process.libp2p_victim", seed.hex())
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `end`
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        assert self.process.stdout is not None
        hello = json.loads(self.process.stdout.readline())
        self.peer = PeerId(hello["peer"])
        self.addresses: list[str] = hello["addresses"]
        self.port = int(self.addresses[0].split("/")[4])

    async def order(self, **order: object) -> object:
        return await trio.to_thread.run_sync(self._order, order)

    def _order(self, order: dict[str, object]) -> object:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    async def admit(self, peer: str, admitted: bool = True) -> None:
        await self.order(do="admit", peer=peer, admitted=admitted)

    async def peers(self) -> list[str]:
        answer = await self.order(do="peers")
        assert isinstance(answer, list)
        return answer

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    @property
    def rss_mb(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6

    def end(self) -> str:
        """Kill it; what it wrote to standard error."""
        self.process.kill()
        self.process.communicate()
        with self._errors:
            self._errors.seek(0)
            return self._errors.read()


class Member(Libp2pHost):
    """A host of ours that follows the victim's topic."""

    def __init__(self) -> None:
        super().__init__(secrets.token_bytes(32), ["/ip4/127.0.0.1/tcp/0"])
        self.inbox = inbox_of(self, TOPIC)


@asynccontextmanager
async def member(victim: Victim) -> AsyncIterator[Member]:
    """Connected to the victim; both admit each other."""
    host = Member()
    host.admit(victim.peer, True)
    await victim.admit(host.peer_id)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        await host.connect(victim.peer, victim.addresses)
        yield host
        nursery.cancel_scope.cancel()


async def gossips(host: Member) -> None:
    """The victim hears what we publish and we hear what it says to that."""
    with trio.fail_after(10):
        for number in itertools.count():  # what is said before the partners have met may get lost
            data = b"%s says %d" % (host.peer_id.encode(), number)
            await host.publish(TOPIC, data)
            with trio.move_on_after(0.5):
                async for _, heard in host.inbox:
                    if heard == b"heard " + data:
                        return


async def served(host: Libp2pHost, victim: Victim) -> None:
    """The victim answers on every lane. Raises what went wrong."""
    for lane in Lane:
        with trio.fail_after(10):
            stream = await host.open_stream(victim.peer, ECHO, lane)
            await stream.send_all(b"are you well?")
            await stream.send_eof()
            answer = b""
            while data := await stream.receive_some():
                answer += data
            await stream.aclose()
        if answer != b"are you well?":
            raise PeerUnreachable(f"the victim answered {answer!r}")


if __name__ == "__main__":
    trio.run(main)
