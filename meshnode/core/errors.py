"""Errors of the runtime, split by who must act.

MeshError                          protocols/errors.py
├── ProtocolError                  a wire rule was broken (Local…: our bug; Remote…: the peer)
├── TransientError                 the world: retried, then reported
│   ├── PeerUnreachable            dial failed, stream reset, no answer in time
│   ├── ContentUnavailable         nobody gave the bytes of this CID in time
│   └── EngineLost                 the engine process died or was killed
├── Declined                       a peer or a policy said no, with a code: nobody's fault
└── FatalError                     a person must act; carries the exit code of the command
    ├── ConfigError                names file, key, value, what is allowed
    ├── IdentityError              key unreadable, wrong passphrase, wrong mode
    ├── ModelError                 a checkpoint or manifest can't be used
    └── DiskError                  no room, no permission, quota reached
"""

from __future__ import annotations

from protocols.errors import MeshError
from protocols.ids import Cid, PeerId


class TransientError(MeshError):
    """The world did it; trying again may help."""


class PeerUnreachable(TransientError):
    """A peer can't be reached, or stopped answering."""

    def __init__(self, text: str, *, peer: PeerId | None = None) -> None:
        super().__init__(text)
        self.peer = peer


class ContentUnavailable(TransientError):
    """Nobody gave the bytes of a CID in time."""

    def __init__(self, text: str, *, cid: Cid | None = None) -> None:
        super().__init__(text)
        self.cid = cid


class EngineLost(TransientError):
    """The engine process died, or missed its deadline and was killed."""


class Declined(MeshError):
    """A peer or a policy said no.

    Codes: `fenced` (we don't serve exactly that), `busy` (retry after `retry_ms`), `too-long`, `no-route`,
    `forbidden`, `invite-expired`, `invite-used`, `stranger`, `other-network`, `not-ready`.
    """

    def __init__(self, code: str, text: str, *, retry_ms: int = 0, peer: PeerId | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.retry_ms = retry_ms
        self.peer = peer


class FatalError(MeshError):
    """A person must act. The text is the sentence that is shown, `exit_code` what the command returns."""

    exit_code = 1


class ConfigError(FatalError):
    """A flag, a file or a variable has a value that can't be used."""

    exit_code = 2


class IdentityError(FatalError):
    """The node key or the network membership can't be used."""

    exit_code = 3


class ModelError(FatalError):
    """A checkpoint, package or manifest can't be used."""

    exit_code = 4


class DiskError(FatalError):
    """Files can't be written: no room, no permission, or the quota is reached."""

    exit_code = 5
