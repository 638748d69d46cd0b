"""A grammar in a fork of the tokenizer's process: it is told the tokens of an answer, and says which may follow.

While the stages compute the next step, the fork finds out what may follow it: nobody waits for it, as a rule.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from contextlib import suppress

import trio

from meshnode.core.children import signal_name
from meshnode.core.errors import Declined, ModelError
from meshnode.text import wire
from meshnode.text.channel import receive, send
from meshnode.text.limits import Limits
from meshnode.text.port import BAD_GRAMMAR, NO_GRAMMAR
from protocols.errors import RemoteProtocolError


class ForkGuide:
    """Implements `Guide` (port.py)."""

    def __init__(self, channel: socket.socket, vocab: int, limits: Limits, end: Callable[[], None]) -> None:
        """`end`: ends the fork behind the channel."""
        self._channel = channel
        self._vocab = vocab
        self._limits = limits
        self._end = end
        self._mask = b""

    async def begin(self, kind: str, text: bytes) -> None:
        """Have the grammar compiled. Call once. Raises Declined `bad-grammar`, `no-grammar`."""
        with suppress(OSError):  # it has died: its answer is missing then
            await send(self._channel, wire.pack_grammar(kind, text))
        self._mask = await self._answer()

    async def mask(self) -> bytes:
        """See port.py."""
        if not self._mask:
            self._mask = await self._answer()
        return self._mask

    async def take(self, token: int) -> None:
        """See port.py."""
        self._mask = b""
        with suppress(OSError):
            await send(self._channel, wire.pack_taken(token))

    def close(self) -> None:
        """See port.py."""
        self._end()

    async def _answer(self) -> bytes:
        limits = self._limits
        answer: object = None
        with trio.move_on_after(limits.wall_s) as patience:
            try:
                frame = await receive(self._channel, wire.MAX_MASK)
                answer = wire.Died(signal.SIGKILL) if frame is None else wire.read_answer(frame)
            except RemoteProtocolError as error:
                raise Declined(NO_GRAMMAR, f"the process for grammars broke its rules: {error}") from error
            except ModelError as error:
                raise Declined(NO_GRAMMAR, f"grammars can't be used here: {error}") from error
        if patience.cancelled_caught:
            raise Declined(BAD_GRAMMAR, f"the grammar took longer than {limits.wall_s:.0f} s; simplify it")
        match answer:
            case wire.Mask(bits) if 8 * len(bits) >= self._vocab:
                return bits
            case wire.Died(signal=signal.SIGXCPU):
                reason = f"computed for more than {limits.walk_cpu_s} s"
            case wire.Died(signal=signal.SIGKILL):
                raise Declined(NO_GRAMMAR, "the process that follows the grammar was killed; ask again")
            case wire.Died(signal=number):
                how = signal_name(number) if number else "it ended without a word"
                reason = f"used more than {limits.bytes >> 20} MiB of memory, or failed badly ({how})"
            case _:
                raise Declined(NO_GRAMMAR, "the process for grammars broke its rules: it sent no mask")
        raise Declined(BAD_GRAMMAR, f"the grammar {reason}; simplify it")
