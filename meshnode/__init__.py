"""meshnode: one private AI machine out of the devices you have.

As a library (docs/library.md):

    import meshnode

    with meshnode.connect() as node:
        print(node.generate("Why is the sky blue?").text)

The rooms, lowest first; imports only point down (tests/test_layers.py holds it):

  protocols/                     the wire: pure messages and machines, no I/O
  meshnode/core/, config/        words that every part uses: errors, settings, health, logs, paths, supervision
  meshnode/policy/, model/       pure decisions: placement, route, chunking; what a model is
  meshnode/*/port.py             interfaces of the outside world: net, store, engine, state
  meshnode/net, store, state, engine, ipfs, ...    adapters that implement the ports
  meshnode/services/             one capability each; they meet through services/port.py
  meshnode/node.py               the services of a node, wired over its parts; assemble.py makes the parts
  meshnode/api/                  what a running node can be asked; client.py, aclient.py, embed.py ask it
  meshnode/cli/, harness/, bench/, doctor/, sim/   on top
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshnode import errors
    from meshnode.aclient import AsyncClient, AsyncStream, aconnect
    from meshnode.api.messages import Answer, Piece, Receipt, Status
    from meshnode.client import Client, Stream, connect
    from meshnode.embed import LocalNode, open_node
    from meshnode.text.question import Question

__version__ = "0.1.0"

_HOMES = {
    "Answer": "meshnode.api.messages",
    "AsyncClient": "meshnode.aclient",
    "AsyncStream": "meshnode.aclient",
    "Client": "meshnode.client",
    "LocalNode": "meshnode.embed",
    "Piece": "meshnode.api.messages",
    "Question": "meshnode.text.question",
    "Receipt": "meshnode.api.messages",
    "Status": "meshnode.api.messages",
    "Stream": "meshnode.client",
    "aconnect": "meshnode.aclient",
    "connect": "meshnode.client",
    "open_node": "meshnode.embed",
}

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "LocalNode",
    "Piece",
    "Question",
    "Receipt",
    "Status",
    "Stream",
    "__version__",
    "aconnect",
    "connect",
    "errors",
    "open_node",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used: `import meshnode` and the command line start fast."""
    if name == "errors":
        return importlib.import_module("meshnode.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'meshnode' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
