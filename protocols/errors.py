"""Errors of the protocols, split by who must act.

MeshError
└── ProtocolError              abstract, never raised itself
    ├── LocalProtocolError     we broke a rule: a bug, the task ends
    └── RemoteProtocolError    the peer broke a rule: its stream is closed, the peer is scored

The rest of the tree lives in `meshnode/core/errors.py`; the base is here because imports only point down.
"""

from __future__ import annotations


class MeshError(Exception):
    """Anything that meshnode raises on purpose. The text is a sentence for the person who must act."""


class ProtocolError(MeshError):
    """A rule of a wire protocol was broken."""


class LocalProtocolError(ProtocolError):
    """Our side tried something its state does not allow."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something that its state, a limit or the encoding does not allow."""
