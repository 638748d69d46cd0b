"""The protocols that a host serves, and the border around their handlers."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Final

import trio

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.core.log import get_logger
from meshnode.net.port import Handler, Stream
from protocols.bucket import Buckets
from protocols.errors import LocalProtocolError, MeshError
from protocols.ids import PeerId

NOT_SERVED: Final = "not-served"
STRANGER: Final = "stranger"
CLOSE_S: Final = 2.0
STREAMS_PER_S: Final = 10.0  # that one peer may open of one protocol: ours open one for a question, or for ever
STREAM_BURST: Final = 100.0

_log = get_logger("net")


class ProtocolTable:
    """Protocol id -> handler, and who may use it."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._open: dict[str, Callable[[], bool]] = {}  # whether strangers may use it now
        self._unbounded: set[str] = set()
        self._streams = Buckets(STREAMS_PER_S, STREAM_BURST)
        self.on_flood: Callable[[PeerId, str], None] = lambda peer, protocol: None

    def add(
        self,
        protocol: str,
        handler: Handler,
        *,
        open_to_strangers: bool | Callable[[], bool] = False,
        bounded: bool = True,
    ) -> None:
        """Raises LocalProtocolError when the protocol is served already."""
        if protocol in self._handlers:
            raise LocalProtocolError(f"{protocol} has a handler already")
        self._handlers[protocol] = handler
        if callable(open_to_strangers):
            self._open[protocol] = open_to_strangers
        elif open_to_strangers:
            self._open[protocol] = lambda: True
        if not bounded:
            self._unbounded.add(protocol)

    def __contains__(self, protocol: str) -> bool:
        return protocol in self._handlers

    @property
    def all(self) -> tuple[str, ...]:
        """Every protocol that has a handler."""
        return tuple(self._handlers)

    def serves(self, protocol: str, peer: PeerId, admitted: Container[PeerId]) -> bool:
        """Whether this peer may use this protocol now."""
        if protocol not in self._handlers:
            return False
        return peer in admitted or (protocol in self._open and self._open[protocol]())

    def names(self, peer: PeerId, admitted: Container[PeerId]) -> list[str]:
        """Every protocol that this peer may use, sorted."""
        return sorted(name for name in self._handlers if self.serves(name, peer, admitted))

    async def run(self, protocol: str, stream: Stream) -> None:
        """Run the handler of a stream and close it. Nothing a handler raises comes out, but cancellation does.

        A peer that opens streams of one protocol faster than anybody needs to has them reset.
        """
        now = trio.current_time()
        if protocol not in self._unbounded and not self._streams.take((stream.peer, protocol), now):
            _log.warning("stream.flooded", protocol=protocol, peer=stream.peer)
            self.on_flood(stream.peer, protocol)
            await _end(stream, clean=False)
            return
        try:
            await self._handlers[protocol](stream)
        except PeerUnreachable as error:
            _log.debug("stream.lost", protocol=protocol, peer=stream.peer, reason=str(error))
            await _end(stream, clean=False)
        except MeshError as error:
            _log.info("stream.ended", protocol=protocol, peer=stream.peer, reason=str(error))
            await _end(stream, clean=False)
        except Exception as error:  # noqa: BLE001 - the border: a bug in a handler costs its stream, not the process
            if isinstance(error, ExceptionGroup) and error.split(MeshError)[1] is None:
                _log.info("stream.ended", protocol=protocol, peer=stream.peer, reason=_sentences(error))
            else:
                _log.exception("handler.failed", protocol=protocol, peer=stream.peer)
            await _end(stream, clean=False)
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
                await stream.reset()
            raise
        else:
            await _end(stream, clean=True)


def _sentences(error: BaseException) -> str:
    """The texts of all errors in a group."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_sentences(inner) for inner in error.exceptions)
    return str(error)


async def _end(stream: Stream, *, clean: bool) -> None:
    with trio.move_on_after(CLOSE_S):
        if clean:
            await stream.aclose()
            return
    await stream.reset()


def refusal(peer: PeerId, protocol: str, code: str) -> Declined:
    """What the opener of a refused stream is told."""
    if code == STRANGER:
        return Declined(
            STRANGER, f"{peer} does not admit us: it has not seen a membership of ours in its network", peer=peer
        )
    return Declined(
        NOT_SERVED, f"{peer} does not serve {protocol}: that role is off there, or its version is another", peer=peer
    )
