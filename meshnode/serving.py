"""What the services of a node that hold layers are told by its configuration."""

from __future__ import annotations

from collections.abc import Callable

from meshnode.config.settings import Config
from meshnode.parts import Parts
from meshnode.services.placement.service import PlacementSettings
from meshnode.services.spans import SpansSettings


def spans_settings(parts: Parts, config: Config, incarnation: Callable[[], int]) -> SpansSettings:
    """`incarnation`: of the node, as routes name it."""
    serve, memory = config.serve, memory_of(parts, config)
    return SpansSettings(
        incarnation=incarnation,
        memory_bytes=memory,
        rng=parts.rng,
        kind=serve.engine,
        threads=serve.threads,
        max_sessions=serve.sessions,
        kv_bytes=serve.kv_memory.of(memory),
    )


def placement_settings(parts: Parts, config: Config) -> PlacementSettings:
    """What the node gives to the mesh."""
    return PlacementSettings(
        memory_bytes=memory_of(parts, config),
        rng=parts.rng,
        wall=parts.wall,
        max_layers=config.serve.layers,
        max_sessions=config.serve.sessions,
    )


def memory_of(parts: Parts, config: Config) -> int:
    """Bytes for weights and KV."""
    return config.serve.memory.of(parts.machine.free_memory_bytes)
