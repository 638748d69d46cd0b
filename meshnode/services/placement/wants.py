"""A move that was decided, as the machine of intents takes it."""

from __future__ import annotations

from meshnode.engine.open_span import OpenSpan
from meshnode.model.release import ServedRelease
from meshnode.policy.moves import Move
from protocols.intent import machine as intent


def want_of(
    release: ServedRelease, move: Move, serving: OpenSpan | None, *, leaves: bool, peers: int, memory: int
) -> intent.Want:
    """
    Args:
      serving: what this node serves now.
      leaves: whether layers of the release are given up.
      peers: nodes of the mesh; `memory`: bytes that this node gives.
    """
    if move.urgent:
        wait = intent.URGENT_WAIT_S
    elif move.source is None or move.repair:
        wait = intent.JOIN_WAIT_S
    else:
        wait = intent.settled_wait_s(peers)
    pause = intent.REPAIR_PAUSE_S if move.repair else intent.ABORT_PAUSE_S
    # A span of another release is in nobody's plan: it goes when the new one is there, or before if need be.
    stale = serving.memory_bytes if serving is not None and move.source is None else 0
    too_much = stale > 0 and stale + release.facts.need(*move.target) > memory
    return intent.Want(
        target=release.span(move.target),
        source=serving.span if serving else None,
        leaves=leaves and not move.urgent,
        exclusive=move.exclusive or too_much,
        wait_s=wait,
        pause_s=intent.JOIN_PAUSE_S if move.source is None else pause,
    )
