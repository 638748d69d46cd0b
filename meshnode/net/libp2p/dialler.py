"""Dialling a peer at the addresses that are known of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import trio
from libp2p.security.noise.exceptions import NoiseFailure

from meshnode.core.errors import PeerUnreachable
from meshnode.net.libp2p.replacements import GuardedMuxer, GuardedSwarm
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.multiaddr import parse_address

CONNECT_S: Final = 10.0
STAGGER_S: Final = 0.3  # an address that does not answer holds up the next one for so long
NO_HANDSHAKE: Final = (
    "it takes the connection and gives no libp2p handshake; either no libp2p node is there, or it and this node do "
    "not have the same network.swarm_key"
)
KEY_HINT: Final = "; this node has a swarm key (network.swarm_key), and only nodes with the same key understand it"
ANOTHER_KEY: Final = "; it may understand only nodes that have the same swarm key (network.swarm_key)"


class Connections(Protocol):
    """The connections that there are."""

    def live(self, peer: PeerId) -> GuardedMuxer | None:
        """One that is up."""

    async def wait_ended(self, peer: PeerId) -> None:
        """Until a peer has a connection that is up, or none at all, not even one that is ending."""


class _Attempt:
    """One round of dials to one peer."""

    def __init__(
        self, swarm: GuardedSwarm, peer: PeerId, is_ours: Callable[[str, int], bool], *, keyed: bool
    ) -> None:
        self._swarm = swarm
        self._peer = peer
        self._is_ours = is_ours
        self._keyed = keyed
        self.failures: list[str] = []  # sentences
        self.silent: dict[str, None] = {}  # took a connection and have not failed or succeeded

    async def run(self, addresses: Sequence[str]) -> None:
        """Try one address after the other, the next one as soon as one fails or takes long; the first one wins."""
        async with trio.open_nursery() as nursery:
            for text in addresses:
                over = trio.Event()
                nursery.start_soon(self._dial, text, over, nursery.cancel_scope)
                with trio.move_on_after(STAGGER_S):
                    await over.wait()

    async def _dial(self, text: str, over: trio.Event, others: trio.CancelScope) -> None:
        where = text.partition("/p2p/")[0]
        try:
            address = parse_address(text)
            if address.peer not in ("", self._peer):
                raise RemoteProtocolError(f"{text} is the address of another peer")
            if self._is_ours(address.host, address.port):
                raise RemoteProtocolError(f"{where} is where this very node listens")
            stream = await trio.open_tcp_stream(address.host, address.port)
            self.silent[where] = None
            await self._swarm.take_socket(stream, self._peer)
        except RemoteProtocolError as error:
            self.failures.append(str(error))
        except Exception as error:  # noqa: BLE001 - the border: whatever the system or a handshake raises
            self.failures.append(f"{where}: {innermost(error)}")
            if where in self.silent and not self._keyed and not _knew_libp2p(error):
                self.failures[-1] += ANOTHER_KEY
            self.silent.pop(where, None)
        else:
            others.cancel()
        over.set()


class Dialler:
    """Makes connections; several callers who want one peer share one attempt."""

    def __init__(
        self,
        swarm: GuardedSwarm,
        connections: Connections,
        is_ours: Callable[[str, int], bool],
        *,
        keyed: bool,
    ) -> None:
        """
        Args:
          is_ours: whether we listen at an IP address and port ourselves: others name their loopback address, too.
          keyed: whether this host has a swarm key.
        """
        self._swarm = swarm
        self._is_ours = is_ours
        self._connections = connections
        self._keyed = keyed
        self._locks: dict[PeerId, trio.Lock] = {}

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Make sure that there is a connection. Raises PeerUnreachable (10 s at most)."""
        lock = self._locks.setdefault(peer, trio.Lock())
        attempt = _Attempt(self._swarm, peer, self._is_ours, keyed=self._keyed)
        try:
            async with lock:
                with trio.move_on_after(CONNECT_S):
                    await self._connections.wait_ended(peer)
                    if self._connections.live(peer) is None:
                        await attempt.run(addresses)
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._locks.pop(peer, None)
        if self._connections.live(peer) is None:
            failures = [*attempt.failures, *(f"{where}: {NO_HANDSHAKE}" for where in attempt.silent)]
            why = "; ".join(failures) or f"no answer within {CONNECT_S:.0f} s at {', '.join(addresses)}"
            why += KEY_HINT if self._keyed else ""
            raise PeerUnreachable(
                f"{peer} can't be reached: {why if addresses else 'no address is known'}", peer=peer
            )


def _knew_libp2p(error: BaseException | None) -> bool:
    """Whether a handshake that failed got as far as Noise, so that both sides have the same swarm key."""
    while error is not None and not isinstance(error, NoiseFailure):
        error = error.__cause__
    return error is not None


def innermost(error: BaseException) -> str:
    """The innermost cause, which is the one that a person can do something about."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(dict.fromkeys(innermost(inner) for inner in error.exceptions))
    text = getattr(error, "strerror", None) or str(error)
    return text or type(error).__name__
