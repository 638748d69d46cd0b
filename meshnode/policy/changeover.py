"""When the mesh goes over from one release to another: make before break, across all nodes.

A node that has memory for both opens its span of the new release beside the old one and says that it is ready. All go
over when every layer of the new one is ready somewhere, so that questions are answered by a whole chain throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from meshnode.model.release import ServedRelease
from protocols.advert.messages import DRAINING, SERVING, Advert, Span
from protocols.ids import PeerId

PATIENCE_S: Final = 180.0  # that a node keeps both: others may be unable to open theirs before it lets go of the old


def may_go_over(
    view: Mapping[PeerId, Advert], us: PeerId, target: Span, new: ServedRelease, old: ServedRelease | None
) -> bool:
    """Whether this node, which has opened `target`, should serve it now instead of its span of the old release.

    view: live adverts; ours may be older than what we know.
    """
    others = [advert for peer, advert in view.items() if peer != us]
    ready = [target, *(span for advert in others for span in _ready(advert))]
    if _whole(ready, new):
        return True
    served = [span for advert in view.values() for span in _served(advert)]
    return old is None or not _whole(served, old)  # nobody is answered by the old one any more


def _served(advert: Advert) -> Iterable[Span]:
    serving = advert.serving
    if serving is not None and serving.state in (SERVING, DRAINING) and serving.span is not None:
        yield serving.span


def _ready(advert: Advert) -> Iterable[Span]:
    yield from _served(advert)
    if advert.serving is not None and advert.serving.ready and advert.serving.target is not None:
        yield advert.serving.target


def _whole(spans: Iterable[Span], release: ServedRelease) -> bool:
    """Whether these spans hold every layer of a release."""
    held = {layer for span in spans if (layers := release.layers_of(span)) is not None for layer in range(*layers)}
    return held >= set(range(release.facts.layers))
