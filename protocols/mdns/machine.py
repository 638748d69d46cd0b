"""Asking who is on the local network and answering, without I/O. SPEC.md, section Behaviour.

Rule 1: no clock, no socket; time comes in as `now`, randomness as a callable, packets go out as bytes.
Rule 2: what comes is from anybody: packets, opened boxes and remembered peers are counted and bounded.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, public_key_of
from protocols.mdns.dns import ANY, PTR, parse, query, response
from protocols.mdns.messages import NAME_BYTES, NONCE_BYTES, SERVICE, Hint, Seal
from protocols.multiaddr import parse_address

TTL_S: Final = 120  # as RFC 6762 recommends for what goes with an address
ASK_S: Final = 300.0  # between questions of all nodes of one network: everybody hears every answer
ASK_ALONE_S: Final = 8.0  # of a node that has found nobody
FIRST_S: Final = (0.0, 1.0, 3.0)  # questions and announcements after the start, or a change of addresses
ANSWER_S: Final = (0.02, 0.12)  # an answer waits for so long, so that not all come at once (section 6)
ANSWERS_S: Final = 1.0  # between two answers (section 6)
RENAME_S: Final = 3600.0  # a name is used for so long
PACKETS_PER_S: Final = 100.0  # read, and as many at once
BOXES_PER_S: Final = 50.0  # opened
MAX_PEERS: Final = 256  # remembered, those heard last


class Allowance:
    """So many at once, and so many in each second."""

    def __init__(self, per_s: float) -> None:
        self._per_s = self._left = per_s
        self._at = 0.0

    def take(self, now: float) -> bool:
        """Whether one more is allowed now."""
        self._left = min(self._per_s, self._left + max(0.0, now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


@dataclass(slots=True)
class _Heard:
    addresses: tuple[str, ...]
    until: float


class Discovery:
    """One node on its local networks."""

    def __init__(self, us: PeerId, seal: Seal, entropy: Callable[[int], bytes], draw: Callable[[], float]) -> None:
        """
        Args:
          entropy: so many random bytes, for names and nonces.
          draw: uniform in [0, 1), for the moments.
        """
        self._us = us
        self._seal = seal
        self._entropy = entropy
        self._draw = draw
        self._addresses: tuple[str, ...] = ()
        self._name, self._named_until = "", -math.inf
        self._first: list[float] = []  # questions with announcements that are still to come
        self._ask_at = math.inf
        self._answer_at = math.inf
        self._answered_at = -math.inf
        self._alone = True
        self._packets, self._boxes = Allowance(PACKETS_PER_S), Allowance(BOXES_PER_S)
        self._heard: OrderedDict[PeerId, _Heard] = OrderedDict()

    def reseal(self, seal: Seal) -> None:
        """The network has another secret."""
        self._seal = seal

    @property
    def deadline(self) -> float:
        """When `tick` is to be called next; infinite: never."""
        return min(self._ask_at, self._answer_at, *self._first, math.inf)

    def found(self, now: float) -> Mapping[PeerId, tuple[str, ...]]:
        """Members on our networks, and where they say that they listen."""
        return {peer: heard.addresses for peer, heard in self._heard.items() if heard.until > now}

    def begin(self, addresses: tuple[str, ...], now: float) -> None:
        """We listen there (multiaddrs; those of the loopback interface are nobody's business): at the start, and
        whenever the network has changed. With no address nothing is said or asked."""
        listed = (parse_address(text) for text in addresses)
        self._addresses = tuple(f"/{one.kind}/{one.host}/tcp/{one.port}" for one in listed)
        self._first = [now + pause for pause in FIRST_S] if self._addresses else []
        self._answer_at = math.inf
        self._plan(now)

    def alone(self, alone: bool, now: float) -> None:
        """Whether nobody is connected."""
        if alone != self._alone:
            self._alone = alone
            self._plan(now)

    def tick(self, now: float) -> tuple[bytes, ...]:
        """The packets that are to be sent now."""
        out = []
        if self._first and self._first[0] <= now:
            self._first = [when for when in self._first if when > now]
            out += [query(SERVICE), self._answer(now)]
            self._plan(now)
        if self._ask_at <= now:
            out.append(query(SERVICE))
            self._plan(now)
        if self._answer_at <= now:
            out.append(self._answer(now))
        return tuple(out)

    def receive(self, data: bytes, now: float) -> bool:
        """A packet of anybody; whether `found` says something else now.

        Raises RemoteProtocolError for a member's hint that can't be used; of strangers' packets nothing is said.
        """
        if not self._packets.take(now):
            return False
        try:
            packet = parse(data)
        except RemoteProtocolError:
            return False
        if any(name == SERVICE and kind in (PTR, ANY) for name, kind in packet.questions):
            self._asked(now)
        instances = {target for name, target in packet.pointers if name == SERVICE and target != self._instance}
        changed = False
        for name, strings in packet.texts:
            if name in instances and self._boxes.take(now):
                hint = self._seal.open(strings)
                changed |= hint is not None and self._take(hint, now)
        return changed

    @property
    def _instance(self) -> str:
        return f"{self._name}.{SERVICE}"

    def _asked(self, now: float) -> None:
        """Somebody asks everybody, so we need not ask soon, and answer if that is not what we have just done."""
        if not self._addresses:
            return
        if not self._alone:
            self._plan(now)
        if self._answer_at == math.inf:
            low, high = ANSWER_S
            self._answer_at = max(now + low + (high - low) * self._draw(), self._answered_at + ANSWERS_S)

    def _answer(self, now: float) -> bytes:
        if now >= self._named_until:
            self._name, self._named_until = self._entropy(NAME_BYTES).hex(), now + RENAME_S
        self._answer_at, self._answered_at = math.inf, now
        strings = self._seal.seal(Hint(peer=self._us, addresses=self._addresses), self._entropy(NONCE_BYTES))
        return response(SERVICE, self._instance, strings, TTL_S)

    def _plan(self, now: float) -> None:
        pause = ASK_ALONE_S if self._alone else ASK_S
        self._ask_at = now + pause * (0.8 + 0.4 * self._draw()) if self._addresses else math.inf

    def _take(self, hint: Hint, now: float) -> bool:
        peer = PeerId(hint.peer)
        public_key_of(peer)
        if peer == self._us:
            return False
        listed = [parse_address(text) for text in hint.addresses]
        if any(one.peer for one in listed):
            raise RemoteProtocolError(f"{peer} names an owner in its addresses on the local network")
        addresses = tuple(f"{one}/p2p/{peer}" for one in listed)
        known = self._heard.pop(peer, None)
        self._heard[peer] = _Heard(addresses, now + TTL_S)
        if len(self._heard) > MAX_PEERS:
            self._heard.popitem(last=False)
        return known is None or known.addresses != addresses or known.until <= now
