"""What the library raises; the tree is in meshnode/core/errors.py."""

from meshnode.core.errors import (
    BadRequest,
    ConfigError,
    ContentUnavailable,
    Declined,
    DiskError,
    EngineLost,
    FatalError,
    IdentityError,
    ModelError,
    NodeError,
    NotRunning,
    PeerUnreachable,
    TransientError,
)
from protocols.errors import MeshError

__all__ = [
    "BadRequest",
    "ConfigError",
    "ContentUnavailable",
    "Declined",
    "DiskError",
    "EngineLost",
    "FatalError",
    "IdentityError",
    "MeshError",
    "ModelError",
    "NodeError",
    "NotRunning",
    "PeerUnreachable",
    "TransientError",
]
