"""Which chain of stages a session takes, over the newest view of the network."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from meshnode.core.signal import Changes
from meshnode.model.release import ServedRelease
from meshnode.policy.route import NoRoute, plan_route
from meshnode.services.port import Adverts, Releases
from protocols.ids import PeerId
from protocols.pipe.messages import Hop

ASK_AGAIN_MS = 10_000  # without a model


class Router:
    """Turns a release into a chain."""

    def __init__(self, us: PeerId, adverts: Adverts, releases: Releases) -> None:
        self._us = us
        self._adverts = adverts
        self._releases = releases

    def route(
        self,
        release: ServedRelease,
        seed: int,
        *,
        in_flight: Mapping[PeerId, int] | None = None,
        avoid: Collection[PeerId] = (),
    ) -> tuple[Hop, ...] | NoRoute:
        """A chain for one session, or why there is none.

        Args:
          seed: draws between peers of equal worth.
          in_flight: our own sessions per peer, which adverts don't show yet.
          avoid: peers that failed us a moment ago.
        """
        shape = release.manifest.architecture
        return plan_route(
            self._adverts.live(),
            release.span((0, shape.layers)),
            self._us,
            seed,
            in_flight=in_flight,
            avoid=avoid,
            row_bytes=4 * shape.hidden,
        )

    @property
    def changes(self) -> tuple[Changes, ...]:
        """One of them moves whenever `usual` may have changed."""
        return self._adverts.changes, self._releases.changes

    def usual(self) -> tuple[Hop, ...] | NoRoute:
        """The chain of a session that is drawn with seed 0 while nothing of ours runs; the same for the same view."""
        release = self._releases.current
        return NoRoute(self._releases.why_none, ASK_AGAIN_MS) if release is None else self.route(release, 0)
