"""The requests to an engine process that say much: what it opens, and which adapters come."""

from __future__ import annotations

import contextlib

from meshnode.engine.port import AdapterSpec, StageSpec
from protocols.enginewire.messages import Adapt, GroupFile, Load


def load_request(spec: StageSpec) -> Load:
    """The request that opens the span of a specification; its number is set when it is sent."""
    arch = spec.architecture
    return Load(
        number=0,
        kind=spec.kind,
        graph=str(spec.graph),
        graph_name=spec.graph_name,
        groups=tuple(GroupFile(name=name, path=str(path)) for name, path in sorted(spec.groups.items())),
        first=spec.first,
        last=spec.last,
        layers=arch.layers,
        hidden=arch.hidden,
        heads=arch.heads,
        kv_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        vocab=arch.vocab,
        context=arch.context,
        threads=spec.threads,
        max_sessions=spec.max_sessions,
        max_kv_bytes=spec.max_kv_bytes,
    )


def adapt_request(adapter: AdapterSpec) -> Adapt:
    """The request that announces an adapter; its number is set when it is sent."""
    return Adapt(
        number=0,
        adapter=adapter.name,
        first=adapter.first,
        last=adapter.last,
        rank=adapter.rank,
        alpha=adapter.alpha,
        targets=adapter.targets,
    )


def weight_bytes(spec: StageSpec) -> int:
    """Bytes of the distinct group files; what is missing is the child's to report."""
    sizes = {}
    for path in set(spec.groups.values()):
        with contextlib.suppress(OSError):
            sizes[path] = path.stat().st_size
    return sum(sizes.values())
