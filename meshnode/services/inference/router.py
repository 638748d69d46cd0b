"""Which chain of stages a session takes, over the newest view of the network and what we have seen of each peer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Final

import trio

from meshnode.core.health import Health
from meshnode.core.log import get_logger
from meshnode.core.signal import Changes
from meshnode.model.release import ServedRelease
from meshnode.policy.experience import Experience, Part
from meshnode.policy.kept_prompts import Kept
from meshnode.policy.route import NoRoute, claimed_us, plan_route, round_trip_us
from meshnode.services.inference.receipt import Receipt
from meshnode.services.port import Adverts, Releases
from protocols.ids import PeerId, short
from protocols.pipe.messages import Hop

ASK_AGAIN_MS: Final = 10_000  # without a model
WAY_US: Final = 2_000  # a message may take so much longer than half the round trip that is advertised

_log = get_logger("router")


class Router:
    """Turns a release into a chain, and learns from how it went."""

    def __init__(self, us: PeerId, adverts: Adverts, releases: Releases, health: Health) -> None:
        self._us = us
        self._adverts = adverts
        self._releases = releases
        self._health = health
        self._experience = Experience()

    def route(
        self,
        release: ServedRelease,
        seed: int,
        *,
        in_flight: Mapping[PeerId, int] | None = None,
        avoid: Collection[PeerId] = (),
        kept: Sequence[Kept] = (),
    ) -> tuple[Hop, ...] | NoRoute:
        """A chain for one session, or why there is none.

        Peers that failed other sessions lately are part of it only where there is no other way.

        Args:
          seed: draws between peers of equal worth.
          in_flight: our own sessions per peer, which adverts don't show yet.
          avoid: peers that failed this very session.
          kept: chains that may hold a beginning of the prompt.
        """
        shape = release.manifest.architecture
        view = self._adverts.live()
        claims = {peer: us for peer, advert in view.items() if (us := claimed_us(advert)) and peer != self._us}
        suspects = self._experience.avoided(trio.current_time()).keys()

        def plan(without: Collection[PeerId]) -> tuple[Hop, ...] | NoRoute:
            return plan_route(
                view,
                release.span((0, shape.layers)),
                self._us,
                seed,
                in_flight=in_flight,
                avoid=without,
                least_us=self._experience.least_us(claims),
                row_bytes=4 * shape.hidden,
                kept=kept,
            )

        found = plan({*avoid, *suspects})
        return plan(avoid) if suspects and isinstance(found, NoRoute) else found

    def choose(
        self,
        seed: int,
        *,
        in_flight: Mapping[PeerId, int] | None = None,
        avoid: Collection[PeerId] = (),
        kept: Sequence[Kept] = (),
    ) -> tuple[ServedRelease, tuple[Hop, ...]] | NoRoute:
        """The release and chain for one session: the one before, while the present one is not whole yet.

        Only when both read and write the same token ids, for a question comes in these.
        """
        release, before = self._releases.current, self._releases.previous
        if release is None:
            return NoRoute(self._releases.why_none, ASK_AGAIN_MS)
        found = self.route(release, seed, in_flight=in_flight, avoid=avoid, kept=kept)
        if not isinstance(found, NoRoute):
            return release, found
        if before is not None and before.token_space == release.token_space:
            other = self.route(before, seed, in_flight=in_flight, avoid=avoid, kept=kept)
            if not isinstance(other, NoRoute):
                return before, other
        return found

    @property
    def changes(self) -> tuple[Changes, ...]:
        """One of them moves whenever `usual` may have changed."""
        return self._adverts.changes, self._releases.changes

    def usual(self) -> tuple[Hop, ...] | NoRoute:
        """The chain of a session that is drawn with seed 0 while nothing of ours runs; the same for the same view."""
        chosen = self.choose(0)
        return chosen if isinstance(chosen, NoRoute) else chosen[1]

    def failed(self, peer: PeerId, reason: str) -> None:
        """A session was lost by a peer, or waited for it in vain: further ones avoid it for a while."""
        if peer == self._us:
            return
        pause = self._experience.failed(peer, reason, trio.current_time())
        words = reason.replace(f"the node {peer}", "it")
        self._health.set("peer-avoided", peer=peer, seconds=round(pause), reason=words)
        _log.warning("peer.avoided", peer=short(peer), seconds=round(pause), reason=reason)

    def answered(self, receipt: Receipt) -> None:
        """An answer came; how fast is compared with what its stages say."""
        others = [(index, hop) for index, hop in enumerate(receipt.route) if hop.peer != self._us]
        self._experience.answered([PeerId(hop.peer) for _, hop in others])
        for _, hop in others:
            self._health.clear("peer-avoided", peer=hop.peer)
        begin = receipt.since  # what came before came by other stages
        steps = receipt.hop_times[begin + 1 :]
        if not steps or not others:
            return

        def spent(index: int) -> float:
            return median(step[index].queue_us + step[index].compute_us for step in steps)

        peers = [self._us, *(PeerId(hop.peer) for hop in receipt.route), self._us]
        view = self._adverts.live()
        told = [
            *(median(step[i].network_us for step in steps) for i in range(len(receipt.route))),
            median(receipt.return_us[begin + 1 :]),
        ]
        ways = sum(
            min(told_us, WAY_US + round_trip_us(view, one, other) / 2)
            for told_us, (one, other) in zip(told, pairwise(peers), strict=True)
        )
        own = sum(spent(index) for index, hop in enumerate(receipt.route) if hop.peer == self._us)
        token_us = median((b - a) * 1e6 for a, b in pairwise(receipt.arrivals[begin:])) - ways - own
        parts = [Part(PeerId(hop.peer), hop.last - hop.first, round(spent(index))) for index, hop in others]
        self._experience.measured(parts, token_us)
        claims = {PeerId(hop.peer): claimed_us(view[PeerId(hop.peer)]) for _, hop in others if hop.peer in view}
        slower = self._experience.slower(claims)
        for peer in claims:
            if peer in slower:
                self._health.set("slow-peer", peer=peer, times=round(slower[peer]))
            else:
                self._health.clear("slow-peer", peer=peer)
