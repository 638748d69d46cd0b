"""Adverts as placement sees them."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_low
from typing import Final

from meshnode.model.fit import Range
from meshnode.policy.placement import Node
from protocols.advert.messages import DRAINING, INTENT, SERVING, Advert, Span
from protocols.ids import PeerId

UNMEASURED_LAYER_US: Final = 1000  # assumed for a layer while nobody has measured one


BELIEVED: Final = 16  # a peer counts as no more than so many times as fast as the median: it may lie, or err


def layer_us_of(view: Mapping[PeerId, Advert]) -> dict[PeerId, int]:
    """Microseconds per layer and row of each peer; who has not measured yet counts as the median of the others.

    The same for everybody who sees the same adverts, so nobody's own measurements are in it (`experience.py`).
    """
    known = [a.layer_decode_us for _, a in sorted(view.items()) if a.layer_decode_us]
    usual = median_low(known) if known else UNMEASURED_LAYER_US
    least = usual // BELIEVED
    return {peer: max(least, advert.layer_decode_us or usual) for peer, advert in sorted(view.items())}


def coarse_us(layer_us: int) -> int:
    """A measured time in steps of a factor of 1.41. One machine measures the same layer 20 % faster or slower
    from one minute to the next, and that must not look like a reason to move."""
    base = 1 << (layer_us.bit_length() - 1)
    if layer_us * 1000 < base * 1189:
        return base
    return base * 1414 // 1000 if layer_us * 1000 < base * 1682 else base * 2


def rate_of(layer_us: int) -> int:
    """Layers per second, in thousandths: how fast placement takes a node to be."""
    return max(1, 1_000_000_000 // coarse_us(layer_us))


def nodes_of(view: Mapping[PeerId, Advert], manifest: str, variant: str, layers: int) -> tuple[Node, ...]:
    """The peers that give memory to serving and do not leave, sorted by peer id.

    A span or target of another release counts as none. A peer that drains keeps its span (it still serves
    sessions) but is not planned with.
    """

    def here(span: Span | None) -> Range | None:
        if span is None or (span.manifest, span.variant) != (manifest, variant):
            return None
        return (span.first, span.last) if span.first < span.last <= layers else None

    speed = layer_us_of(view)
    out = []
    for peer, advert in sorted(view.items()):
        if advert.leaving:
            continue
        serving = advert.serving
        span = here(serving.span) if serving is not None and serving.state in (SERVING, DRAINING) else None
        if not advert.memory_bytes and span is None:
            continue
        out.append(
            Node(
                peer=peer,
                memory_bytes=advert.memory_bytes,
                max_layers=advert.max_layers,
                rate=rate_of(speed[peer]),
                span=span,
                target=here(serving.target) if serving is not None else None,
                epoch=serving.epoch if serving is not None else 0,
                tentative=serving is not None and serving.state == INTENT,
                draining=serving is not None and serving.state == DRAINING,
            )
        )
    return tuple(out)
