"""A node inside one's own trio program: for applications, tests, and `meshnode start`.

async with meshnode.open_node() as node:
    print((await node.generate("Why is the sky blue?")).text)
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from pathlib import Path

import trio

from meshnode.aclient import AsyncClient
from meshnode.api.commands import Commands
from meshnode.api.control import ControlService
from meshnode.api.messages import Json
from meshnode.assemble import assemble
from meshnode.config.load import load_config
from meshnode.config.settings import Config
from meshnode.core.errors import IdentityError
from meshnode.core.paths import data_folder
from meshnode.core.supervise import Service
from meshnode.membership.identity import Identity
from meshnode.node import Node
from meshnode.parts import Parts
from protocols.ids import PeerId


def no_passphrase() -> str:
    """Raises IdentityError: the key is protected, and nobody was named who knows its passphrase."""
    raise IdentityError("the node key is protected by a passphrase; give open_node a `passphrase` function")


@asynccontextmanager
async def open_node(
    data: Config | str | os.PathLike[str] | None = None,
    *,
    passphrase: Callable[[], str] = no_passphrase,
    change: Callable[[Parts], Parts] | None = None,
) -> AsyncIterator[LocalNode]:
    """Run the node of a data folder in this program, under trio. It answers its control socket, too.

    When the block ends, the node hands over its layers and stops; when an error or a cancellation ends the block,
    it stops without handing over.

    Args:
      data: the data folder (None: as `meshnode.connect` finds it), which `meshnode init` or `join` has made; or its
        configuration.
      passphrase: asked when the node key is protected.
      change: gives other parts than the configuration asks for, for tries with nodes that misbehave.

    Raises FatalError: the folder is in use, no membership, no space; and whatever ends the node.
    """
    if not isinstance(data, Config):
        data = load_config(data_folder(None if data is None else Path(data), os.environ), os.environ)
    identity = Identity.load(data.paths.folder, passphrase)
    with ExitStack() as files, _alone():
        parts = assemble(data, identity, files)
        node = Node(parts if change is None else change(parts), data)
        doors, api_url = _http(node)
        commands = Commands(node, api_url)
        control = ControlService(data.paths.control_socket, commands.table, commands.name_peers)
        async with trio.open_nursery() as nursery:
            await nursery.start(node.run, *doors, control)
            async with LocalNode(node, commands) as local:
                yield local
            local.leave()
            await local.wait_stopped()


def _http(node: Node) -> tuple[tuple[Service, ...], str]:
    """What answers HTTP, if the owner wants that, and where. Raises ConfigError: it can't listen there."""
    if not node.config.http.enabled:
        return (), ""
    from meshnode.http.serve import http_service  # brings Starlette and Hypercorn

    return http_service(node)


class LocalNode(AsyncClient):
    """A node in this process: what a client of it can do, and more."""

    def __init__(self, node: Node, commands: Commands) -> None:
        """`node`: runs already."""
        super().__init__(_Direct(commands))
        self._node = node

    @property
    def peer(self) -> PeerId:
        """Its peer id."""
        return self._node.identity.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial it."""
        return tuple(self._node.host.addresses)

    @property
    def leaving(self) -> bool:
        """Whether it hands over its layers, or has stopped."""
        return self._node.stopping.is_set()

    def leave(self) -> None:
        """Begin to hand over its layers and stop."""
        self._node.stopping.set()

    async def wait_stopped(self) -> None:
        """Until it has stopped: after `leave`, or because somebody else asked for it."""
        await self._node.ended.wait()


class _Direct:
    """Commands without a socket between."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    async def request(self, name: str, fields: Json) -> AsyncGenerator[Json, None]:
        async with aclosing(self._commands.table[name](fields)) as answers:
            async for answer in answers:
                yield answer


@contextmanager
def _alone() -> Iterator[None]:
    """An error that comes alone is raised alone, not in the group that a nursery makes of it."""
    try:
        yield
    except BaseExceptionGroup as group:
        alone: BaseException = group
        while isinstance(alone, BaseExceptionGroup) and len(alone.exceptions) == 1:
            alone = alone.exceptions[0]
        if isinstance(alone, BaseExceptionGroup):
            raise
        raise alone from alone.__cause__
