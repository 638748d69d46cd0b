"""What a node must not forget of the roll-outs of adapters."""

from __future__ import annotations

from typing import Final

from meshnode.core.errors import DiskError
from meshnode.state.port import Records
from protocols.codec import decode, encode
from protocols.errors import RemoteProtocolError
from protocols.rollout.memory import Memory

_ROLLOUT: Final = "rollout"


def remembered(state: Records) -> Memory:
    """What was kept last.

    Raises DiskError when it can't be read: without it, what was revoked could be served again.
    """
    data = state.record(_ROLLOUT, _ROLLOUT)
    if data is None:
        return Memory()
    try:
        return decode(Memory, data)
    except RemoteProtocolError as error:
        raise DiskError(
            f"What this node knows of released and revoked adapters can't be read: {error}. Start the version of "
            "meshnode that wrote it."
        ) from error


def remember(state: Records, memory: Memory) -> None:
    """Keep it, in place of what was kept before."""
    state.put_record(_ROLLOUT, _ROLLOUT, encode(memory))
