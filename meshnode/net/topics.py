"""The border around what takes gossip."""

from __future__ import annotations

from meshnode.core.log import get_logger
from meshnode.net.port import Take
from protocols.ids import PeerId

_log = get_logger("net")


def contained(topic: str, take: Take) -> Take:
    """The same, but a bug in it costs its message, not the process."""

    def safe(forwarder: PeerId, data: bytes) -> bool:
        try:
            return take(forwarder, data)
        except Exception:  # noqa: BLE001 - the border
            _log.exception("gossip.failed", topic=topic, peer=forwarder)
            return False

    return safe
