"""Errors of the runtime, split by who must act.

MeshError                          protocols/errors.py
├── ProtocolError                  a wire rule was broken (Local…: our bug; Remote…: the peer)
├── TransientError                 the world: retried, then reported
│   ├── PeerUnreachable            dial failed, stream reset, no answer in time
│   ├── ContentUnavailable         nobody gave the bytes of this CID in time
│   ├── EngineLost                 the engine process died or was killed
│   ├── TokenizerLost              the process of the tokenizer died or was killed
│   └── TrainerLost                the process that trains died or was killed
├── Declined                       a peer or a policy said no, with a code: nobody's fault
│   └── BadRequest                 what was asked for can't be done as it was asked
└── FatalError                     a person must act
    ├── ConfigError                names file, key, value, what is allowed
    ├── IdentityError              key unreadable, wrong passphrase, wrong mode
    ├── ModelError                 a checkpoint or manifest can't be used
    ├── DiskError                  no room, no permission, quota reached
    ├── NodeError                  the running node gave no answer: it hangs, stopped, or has a bug
    └── NotRunning                 no node runs in the data folder

Each class has the exit code that the command line returns for it; EXIT_CODES says what they mean.
"""

from __future__ import annotations

from typing import Final

from protocols.errors import MeshError
from protocols.ids import Cid, PeerId

EXIT_CODES: Final = {
    0: "it worked",
    1: "a bug, or `meshnode doctor` found something wrong",
    2: "a flag, a setting or a question can't be used as it is written",
    3: "the node key, the membership or a ticket can't be used, or a role is missing",
    4: "a model can't be used: damaged, unknown, or not one of ours",
    5: "files can't be written: no space, no permission, or the quota is reached",
    6: "the running node gave no answer: it hangs, stopped, or has a bug",
    7: "no node runs in this data folder",
    8: "a peer or the network said no, or could not be reached",
    9: "the mesh is not ready (`meshnode status`), or the harness could not do it",
    130: "stopped with Ctrl-C",
    141: "the reader of the output went away",
    143: "ended by SIGTERM",
}


class TransientError(MeshError):
    """The world did it; trying again may help."""

    exit_code = 8


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


class TokenizerLost(TransientError):
    """The process of the tokenizer died, whoever killed it."""


class TrainerLost(TransientError):
    """The process that trains died, whoever killed it; what it had reached is kept."""


# exit codes of what is declined, where it is not 8: the same cause ends with the same code, whoever notices it
DECLINED_EXIT: Final = {
    "too-long": 2,
    "forbidden": 3,
    "invite-expired": 3,
    "invite-used": 3,
    "other-network": 3,
    "stranger": 3,
    "bad-adapter": 4,
    "not-ready": 9,
    "no-route": 9,
    "no-model": 9,
}


class Declined(MeshError):
    """A peer or a policy said no.

    Codes: `fenced` (we don't serve exactly that), `busy` (retry after `retry_ms`), `too-long`, `no-route`,
    `forbidden`, `invite-expired`, `invite-used`, `stranger`, `other-network`, `not-ready`, `no-model`,
    `bad-request`, `no-adapter` (can't be fetched), `bad-adapter` (damaged, or for another model).
    """

    exit_code = 8

    def __init__(self, code: str, text: str, *, retry_ms: int = 0, peer: PeerId | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.exit_code = DECLINED_EXIT.get(code, self.exit_code)
        self.retry_ms = retry_ms
        self.peer = peer


class BadRequest(Declined):
    """What was asked for can't be done as it was asked: a number out of its range, two prompts, none."""

    exit_code = 2

    def __init__(self, text: str) -> None:
        super().__init__("bad-request", text)


class FatalError(MeshError):
    """A person must act. The text is the sentence that is shown."""

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


class NodeError(FatalError):
    """The running node gave no answer. Codes: `timeout`, `gone` (it stopped), `internal` (a bug)."""

    exit_code = 6

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class NotRunning(FatalError):
    """No node runs in the data folder."""

    exit_code = 7
