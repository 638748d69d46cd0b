"""Which chain of stages one session uses.

A layered graph over (layer, peer): from a boundary, a peer that serves the next layer can run to the end of its
span, or to any layer where another span begins or ends (engines split a span on demand, at a small price).
Dijkstra over the boundaries gives the cheapest chain. At every boundary only two candidates are looked at,
drawn in proportion to their speed: advertised load is always stale, and if everybody took the best peer, all
would take the same one (Mitzenmacher, "The power of two choices", 2001). Our own work that an advert can't
show yet is added to what it says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from meshnode.core.sizes import counted
from meshnode.model.fit import Range
from meshnode.policy.chain import START, cheapest
from meshnode.policy.kept_prompts import Kept
from meshnode.policy.mesh_view import layer_us_of
from meshnode.policy.placement import runs
from protocols.advert.messages import INTENT, LOADING, SERVING, Advert, Serving, Span
from protocols.ids import PeerId, short
from protocols.multiaddr import is_loopback
from protocols.pipe.messages import MAX_STAGES, Hop
from protocols.words import layers

CANDIDATES: Final = 2  # peers looked at per boundary
UNKNOWN_ROUND_TRIP_US: Final = 150_000  # Petals' value for a link that nobody has measured
HOP_US: Final = 800  # every hop costs this much besides the wire: fewer stages win between equals
CUT_US: Final = 200  # entering or leaving a span inside it
FULL_US: Final = 10_000_000  # a peer without a free session is the last choice
BANDWIDTH_BYTES_MS: Final = 12_500  # 100 Mbit/s, where the link is not loopback
ANSWER_TOKENS: Final = 128  # an answer is taken to be so long when a shorter prompt is weighed against a slower chain
PROMPT_SPEED: Final = 2  # rows of a prompt in the time of one token, on the slowest device seen
ROW_BYTES: Final = 4096  # hidden state of one token, if the caller does not know better


@dataclass(frozen=True, slots=True)
class NoRoute:
    """Why there is no chain, as a sentence, and when asking again makes sense."""

    reason: str
    retry_ms: int


@dataclass(frozen=True, slots=True)
class _Candidate:
    peer: PeerId
    incarnation: int
    first: int
    last: int
    layer_us: int  # one row through one layer
    wait_us: int  # before our step is taken up


def round_trip_us(view: Mapping[PeerId, Advert], one: PeerId, other: PeerId) -> int:
    """Microseconds between two peers, as either measured it; 0 to oneself and between peers on one machine."""
    if one == other:
        return 0
    known = [
        trip.us
        for here, there in ((one, other), (other, one))
        if here in view
        for trip in view[here].round_trips
        if trip.peer == there
    ]
    if known:
        return min(known)
    both_local = all(peer in view and _is_local(view[peer]) for peer in (one, other))
    return 0 if both_local else UNKNOWN_ROUND_TRIP_US


def _is_local(advert: Advert) -> bool:
    """Whether the peer can only be reached on the machine it runs on."""
    return bool(advert.addresses) and all(map(is_loopback, advert.addresses))


def claimed_us(advert: Advert) -> int:
    """Microseconds of a row through a layer of what the peer serves, as it says; 0 when it does not."""
    serving = advert.serving
    if serving is None or serving.span is None:
        return 0
    return serving.decode_us // (serving.span.last - serving.span.first)


def _serves(serving: Serving | None, model: Span) -> bool:
    if serving is None or serving.state != SERVING or serving.span is None:
        return False
    span = serving.span
    return (span.manifest, span.variant) == (model.manifest, model.variant) and span.first < span.last <= model.last


def _draw(stages: list[_Candidate], seed: int, boundary: int) -> list[_Candidate]:
    """`CANDIDATES` of the stages, drawn without replacement in proportion to their speed."""
    left = list(stages)
    out: list[_Candidate] = []
    while left and len(out) < CANDIDATES:
        weights = [max(1, 1_000_000_000 // (stage.layer_us + stage.wait_us)) for stage in left]
        text = f"meshnode/route/1:{seed}:{boundary}:{len(out)}".encode()
        ticket = int.from_bytes(sha256(text).digest()[:8], "big") % sum(weights)
        for index, weight in enumerate(weights):
            ticket -= weight
            if ticket < 0:
                out.append(left.pop(index))
                break
    return out


def plan_route(
    view: Mapping[PeerId, Advert],
    model: Span,
    origin: PeerId,
    seed: int,
    *,
    in_flight: Mapping[PeerId, int] | None = None,
    avoid: Collection[PeerId] = (),
    least_us: Mapping[PeerId, int] | None = None,
    row_bytes: int = ROW_BYTES,
    kept: Sequence[Kept] = (),
) -> tuple[Hop, ...] | NoRoute:
    """The chain of stages for a new session, or why there is none.

    A chain that has kept a beginning of the prompt is taken where that saves more than it costs.

    Args:
      view: live adverts, ours included if we serve.
      model: all layers of what is asked for, which begin at 0.
      seed: draws the candidates; another seed spreads load differently.
      in_flight: our own sessions per peer that run now.
      avoid: peers that failed us a moment ago.
      least_us: per peer, below which its word on the time of a layer is not believed.
      row_bytes: size of one hidden state.
      kept: chains that may hold a beginning of the prompt.
    """
    busy = in_flight or {}
    speed = layer_us_of(view)
    stages: list[_Candidate] = []
    for peer, advert in sorted(view.items()):
        serving = advert.serving
        if advert.leaving or peer in avoid or serving is None or not _serves(serving, model):
            continue
        assert serving.span is not None
        first, last = serving.span.first, serving.span.last
        layer_us = max(1, claimed_us(advert) or speed[peer], (least_us or {}).get(peer, 0))
        mine = busy.get(peer, 0)
        wait = serving.queue_us + mine * layer_us * (last - first)
        if serving.max_sessions and max(serving.sessions, mine) >= serving.max_sessions:
            wait += FULL_US
        stages.append(_Candidate(peer, advert.incarnation, first, last, layer_us, wait))
    chain = _cheapest(view, stages, model.last, origin, seed, row_bytes)
    if chain is None:
        return _why_not(view, stages, model, avoid)
    if len(chain) > MAX_STAGES:
        return NoRoute(f"the shortest chain has {len(chain)} stages; {MAX_STAGES} are possible", 30_000)
    planned = tuple(Hop(peer=s.peer, incarnation=s.incarnation, first=a, last=b) for s, (a, b) in chain)
    return _kept_chain(
        view, stages, planned, origin, row_bytes, [one for one in kept if one.manifest == model.manifest]
    )


def _kept_chain(
    view: Mapping[PeerId, Advert],
    stages: Sequence[_Candidate],
    planned: tuple[Hop, ...],
    origin: PeerId,
    row_bytes: int,
    kept: Sequence[Kept],
) -> tuple[Hop, ...]:
    """The chain that answers soonest: the planned one, or one that has a part of the prompt."""
    known = {stage.peer: stage for stage in stages}

    def answer_us(route: tuple[Hop, ...]) -> int:
        peers = [PeerId(hop.peer) for hop in route]
        links = zip([origin, *peers], [*peers, origin], strict=True)
        ways = sum(_link_us(view, one, other, row_bytes) for one, other in links)
        work = sum(_run_us(known[PeerId(hop.peer)], (hop.first, hop.last)) for hop in route)
        return (ways + work) * ANSWER_TOKENS

    def saved_us(one: Kept) -> int:
        row = sum((hop.last - hop.first) * known[PeerId(hop.peer)].layer_us for hop in one.route)
        return one.tokens * row // PROMPT_SPEED

    def stands(hop: Hop) -> bool:
        stage = known.get(PeerId(hop.peer))
        if stage is None or stage.incarnation != hop.incarnation:
            return False
        return stage.first <= hop.first and hop.last <= stage.last

    able = [one for one in kept if all(map(stands, one.route))]
    best = min(able, key=lambda one: answer_us(one.route) - saved_us(one), default=None)
    if best is None or answer_us(best.route) - saved_us(best) >= answer_us(planned):
        return planned
    return best.route


def _link_us(view: Mapping[PeerId, Advert], one: PeerId, other: PeerId, row_bytes: int) -> int:
    """One row on its way."""
    if one == other:
        return 0
    trip = round_trip_us(view, one, other)
    return HOP_US + trip // 2 + (row_bytes * 1000 // BANDWIDTH_BYTES_MS if trip else 0)


def _run_us(stage: _Candidate, part: Range) -> int:
    """One row through these layers of a stage, and before that its wait."""
    first, last = part
    cuts = (first != stage.first) + (last != stage.last)
    return stage.wait_us + (last - first) * stage.layer_us + cuts * CUT_US


def _cheapest(
    view: Mapping[PeerId, Advert], stages: list[_Candidate], layers: int, origin: PeerId, seed: int, row_bytes: int
) -> list[tuple[_Candidate, Range]] | None:
    known = {stage.peer: stage for stage in stages}

    def link(one: PeerId, other: PeerId) -> int:
        return _link_us(view, one, other, row_bytes)

    def drawn(at: int, able: Sequence[str]) -> list[str]:
        out: list[str] = [stage.peer for stage in _draw([known[PeerId(peer)] for peer in able], seed, at)]
        return [*out, origin] if at == 0 and origin in able and origin not in out else out

    chain = cheapest(
        {stage.peer: (stage.first, stage.last) for stage in stages},
        layers,
        hop_us=lambda before, peer: link(PeerId(before) if before != START else origin, PeerId(peer)),
        run_us=lambda peer, part: _run_us(known[PeerId(peer)], part),
        back_us=lambda peer: link(PeerId(peer), origin),
        candidates=drawn,
    )
    return None if chain is None else [(known[PeerId(stage.peer)], stage.layers) for stage in chain.stages]


def in_words(ranges: Collection[Range]) -> str:
    """Layer ranges for people, last layer included: "layers 0 to 9 and layer 12"."""
    parts = [layers(a, b) for a, b in ranges]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"


def _why_not(
    view: Mapping[PeerId, Advert], stages: list[_Candidate], model: Span, avoid: Collection[PeerId]
) -> NoRoute:
    covered = {layer for s in stages for layer in range(s.first, s.last)}
    holes = runs(layer for layer in range(model.last) if layer not in covered)
    words = in_words(holes)
    shunned = sorted(
        peer
        for peer in avoid
        if peer in view
        and _serves(serving := view[peer].serving, model)
        and serving is not None
        and serving.span is not None
        and any(a < serving.span.last and serving.span.first < b for a, b in holes)
    )
    loading = sum(
        1
        for advert in view.values()
        if advert.serving is not None
        and advert.serving.target is not None
        and advert.serving.state in (INTENT, LOADING, SERVING)
    )
    verb = "is" if len(holes) == 1 and holes[0][1] - holes[0][0] == 1 else "are"
    if shunned:
        names = ", ".join(short(peer) for peer in shunned)
        return NoRoute(f"{words} {verb} held only by peers that failed a moment ago ({names})", 5_000)
    said = next((f"; {a.name or short(p)} says: {a.trouble}" for p, a in sorted(view.items()) if a.trouble), "")
    if loading:
        nodes = counted(loading, "node is", "nodes are")
        return NoRoute(f"{words} {verb} held by nobody; {nodes} loading{said}", 2_000)
    return NoRoute(f"{words} {verb} held by nobody, and no node is loading{said}", 10_000)
