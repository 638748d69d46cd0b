"""How many peers are asked at once: all where links are slow, few where this device is the limit. Virtual time."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Sequence

import pytest

from protocols.bitswap.choice import MAX_FIRST
from protocols.bitswap.client import Arrived, Client, Event, Offer, PeerDown, PeerUp, Send, Tick, Want
from protocols.bitswap.messages import PresenceType
from protocols.bitswap.width import FIRST_REST_S, LAST_REST_S, Spread
from protocols.ids import PeerId
from tests.trees import numbered_cid as cid

MIB = 1 << 20
LATENCY = 0.002  # seconds, one way


class Link:
    """Peers with their own rates and, behind them, a device that takes blocks in one after the other."""

    def __init__(self, rates: Sequence[float], *, intake: float, cost: float = 0.0, first: int = 0) -> None:
        """
        Args:
          rates: bytes per second of each peer.
          intake: bytes per second of the device when one peer sends.
          cost: part of the intake that each further sending peer takes away.
          first: blocks below this number are held by the last peer alone.
        """
        self.client = Client()
        self.now = 0.0
        self.from_peer: Counter[PeerId] = Counter()
        self._rates = {PeerId(f"peer-{n}"): rate for n, rate in enumerate(rates)}
        self._intake, self._cost, self._first = intake, cost, first
        self._free = dict.fromkeys(self._rates, 0.0)  # when a peer has sent everything so far
        self._taken = 0.0  # when the device has taken everything in so far
        self._events: list[tuple[float, int, PeerId, int]] = []
        self._count = 0
        self._cancelled: set[tuple[PeerId, int]] = set()
        self.killed: set[PeerId] = set()

    @property
    def peers(self) -> tuple[PeerId, ...]:
        return tuple(self._rates)

    def give(self, event: Event) -> None:
        for effect in self.client.handle(event, self.now):
            if isinstance(effect, Send):
                for entry in effect.message.entries:
                    number = int.from_bytes(entry.cid[4:], "big")
                    if entry.cancel:
                        self._cancelled.add((effect.peer, number))
                    else:
                        self._cancelled.discard((effect.peer, number))
                        self._ask(effect.peer, number)

    def _ask(self, peer: PeerId, number: int) -> None:
        lacks = number < self._first and peer != self.peers[-1]
        start = max(self.now + LATENCY, self._free[peer])
        self._free[peer] = start if lacks else start + MIB / self._rates[peer]
        self._count += 1
        heapq.heappush(self._events, (self._free[peer] + LATENCY, self._count, peer, -1 if lacks else number))
        if lacks:
            self._lacking = number

    def fetch(self, blocks: int, *, kill_at: int | None = None) -> float:
        """Seconds until every block is here."""
        begun = self.now
        self.give(Offer(1, self.peers))
        for peer in self.peers:
            self.give(PeerUp(peer))
        self.give(Want(1, {cid(number): MIB for number in range(blocks)}))
        got: set[int] = set()
        while len(got) < blocks:
            deadline = self.client.deadline
            if deadline is not None and (not self._events or deadline < self._events[0][0]):
                self.now = max(self.now, deadline)
                self.give(Tick())
                continue
            at, _, peer, number = heapq.heappop(self._events)
            if peer in self.killed or (peer, number) in self._cancelled:
                continue
            if number < 0:
                self.now = max(self.now, at)
                self.give(Arrived(peer, [], [(cid(self._lacking), PresenceType.DONT_HAVE)]))
                continue
            sending = {other for when, _, other, _ in self._events if when <= at + 0.05} | {peer}
            intake = self._intake * (1 - self._cost * (len(sending) - 1))
            self._taken = max(self._taken, at) + MIB / intake
            self.now = max(self.now, self._taken)
            got.add(number)
            self.from_peer[peer] += MIB
            self.give(Arrived(peer, [(cid(number), bytes(MIB))]))
            if kill_at is not None and len(got) == kill_at:
                victim = self.from_peer.most_common(1)[0][0]
                self.killed.add(victim)
                self.give(PeerDown(victim))
        return self.now - begun


FAST = 1e12  # no limit


@pytest.mark.parametrize("rate_mb", [1, 10, 30, 60, 120])
def test_slow_links_add_up(rate_mb: int) -> None:
    blocks = max(60, 6 * rate_mb)
    alone = Link([rate_mb * 1e6], intake=FAST).fetch(blocks)
    together = Link([rate_mb * 1e6] * 3, intake=FAST).fetch(blocks)
    assert alone / together > 2.5


def test_unequal_links_add_up() -> None:
    alone = Link([10e6], intake=FAST).fetch(300)
    assert alone / Link([1e6, 3e6, 10e6], intake=FAST).fetch(300) > 1.25  # 14 of 10


def test_many_slow_links_add_up() -> None:
    alone = Link([4e6], intake=FAST).fetch(600)
    assert alone / Link([4e6] * 16, intake=FAST).fetch(600) > 12


def test_where_one_peer_is_enough_the_others_are_spared() -> None:
    link = Link([FAST] * 3, intake=350e6, cost=0.1)
    alone = Link([FAST], intake=350e6).fetch(500)
    assert link.fetch(500) < 1.05 * alone
    assert link.from_peer.most_common(1)[0][1] > 0.8 * 500 * MIB


@pytest.mark.parametrize("rates", [[1e6, FAST], [FAST, 1e6], [1e6, 1e6, 1e6, FAST]])
def test_a_slow_peer_costs_little_wherever_it_stands(rates: list[float]) -> None:
    alone = Link([FAST], intake=350e6).fetch(500)
    assert Link(rates, intake=350e6).fetch(500) < 1.2 * alone


def test_when_the_peer_in_use_dies_another_takes_over() -> None:
    link = Link([FAST] * 3, intake=350e6, cost=0.1)
    alone = Link([FAST], intake=350e6).fetch(500)
    assert link.fetch(500, kill_at=200) < 1.15 * alone
    assert len(link.killed) == 1 and len(link.from_peer) >= 2


def test_a_peer_that_lacks_blocks_does_not_keep_the_one_that_has_them_from_being_asked() -> None:
    link = Link([FAST, FAST], intake=350e6, first=100)
    assert link.fetch(200) < 1.5
    assert link.from_peer[link.peers[-1]] >= 100 * MIB


def test_of_many_unknown_peers_a_few_at_a_time_are_asked_for_their_first_block() -> None:
    link = Link([FAST] * 40, intake=350e6, cost=0.02)
    client = link.client
    for peer in link.peers:
        client.handle(PeerUp(peer), 0.0)
    client.handle(Offer(1, link.peers), 0.0)
    out = client.handle(Want(1, {cid(number): MIB for number in range(500)}), 0.0)
    asked = [effect for effect in out if isinstance(effect, Send)]
    assert MAX_FIRST <= len(asked) <= MAX_FIRST + 1  # one of them is the peer in use


def feed(spread: Spread, now: float, rate: float, seconds: float, peers: int = 8) -> float:
    """Blocks at a rate for a while; the time after it."""
    for _ in range(round(rate * seconds / MIB)):
        now += MIB / rate
        spread.arrived(MIB)
        spread.decide(now, peers, 16 * MIB)
    return now


def test_a_modest_rate_widens_without_trials_and_no_further_than_there_are_peers() -> None:
    spread, widths = Spread(), []
    for step in range(1, 9):
        spread.decide(step * 0.06, 5, 4 * MIB)
        widths.append(spread.width)
    assert widths == [2, 4, 8, 8, 8, 8, 8, 8]


def test_nothing_under_way_counts_as_no_time() -> None:
    spread = Spread()
    for second in range(100):
        spread.decide(float(second), 5, 0)
    spread.decide(99.01, 5, 4 * MIB)
    assert spread.width == 1


def test_trials_become_rare_and_a_new_peer_makes_them_due_at_once() -> None:
    spread, now, trials = Spread(), 0.0, []
    width = spread.width
    for _ in range(20000):
        now = feed(spread, now, 300e6, 0.01)
        if spread.width > width:
            trials.append(now)
        width = spread.width
    gaps = [after - before for before, after in itertools.pairwise(trials)]
    assert gaps[0] < 2 * FIRST_REST_S and gaps[-1] > 0.9 * LAST_REST_S
    assert len(trials) < 10 and width == 1
    spread.changed()
    for _ in range(10):
        now = feed(spread, now, 300e6, 0.01)
        width = max(width, spread.width)
    assert width == 2


def test_a_pause_of_this_device_does_not_widen_and_a_peer_that_became_slow_does() -> None:
    spread = Spread()
    now = feed(spread, 0.0, 300e6, 1.0)
    assert spread.width == 1
    spread.decide(now + 0.4, 8, 16 * MIB)
    assert spread.width == 1
    now = feed(spread, now + 0.4, 300e6, 0.1)
    spread.decide(now + 0.6, 8, 16 * MIB)
    assert spread.width == 2


def test_more_peers_stay_while_each_doubling_is_worth_it() -> None:
    spread, now = Spread(), 0.0
    for _ in range(400):
        now = feed(spread, now, 100e6 * min(spread.width, 4), 0.01)
    assert spread.width == 4


def test_a_rate_that_rises_by_itself_speaks_for_nobody() -> None:
    """In its first moments every transfer gets faster, with however many peers."""
    spread = Spread()
    now, rate, widths = 0.0, 200e6, set()
    for _ in range(30):
        now += 0.05
        rate = min(480e6, 1.3 * rate)
        spread.arrived(round(rate * 0.05))
        spread.decide(now, 3, 10 * MIB)
        widths.add(spread.width)
    assert spread.width == 1, "what more peers did not bring, they do not keep"
    assert widths == {1, 2}, "it was tried, once the rate was steady"


def test_a_transfer_that_begins_slowly_is_helped_soon_whatever_the_one_before_was() -> None:
    """The peer that was fast may not be the one that is asked now."""
    spread = Spread()
    now = 0.0
    for _ in range(60):
        now += 0.05
        spread.arrived(24 * MIB)
        spread.decide(now, 3, 10 * MIB)
    assert spread.width == 1
    spread.decide(now + 10, 3, 0)
    spread.decide(now + 10.06, 3, 10 * MIB)
    assert spread.width == 2
