"""The walk towards a key, the table and the answering side, without I/O."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from protocols import kad
from protocols.errors import LocalProtocolError
from protocols.ids import PeerId, base58_encode
from protocols.kad.lookup import (
    ALPHA,
    LOOKUP_S,
    MAX_ASKED,
    MAX_CANDIDATES,
    MAX_FOUND,
    MAX_UNDER_WAY,
    SLOW_S,
    TRANSITIONS,
    Answered,
    Ask,
    Begin,
    Done,
    Failed,
    Found,
    K,
    Lookup,
    Tick,
)
from protocols.kad.messages import Kind, Peer, place, place_of
from protocols.kad.table import BUCKETS, MAX_FAILURES, Table

KEY = b"\x12\x20" + bytes([1] * 32)


def peer(number: int, *addresses: str) -> Peer:
    name = PeerId(base58_encode(b"\x12\x20" + number.to_bytes(32, "big")))
    return Peer(name, addresses or (f"/ip4/10.0.{number >> 8 & 255}.{number & 255}/tcp/4331",))


US = peer(0)
CROWD = [peer(number) for number in range(1, 400)]
NEAREST = sorted(CROWD, key=lambda p: place_of(p.id) ^ place(KEY))


def lookup(kind: Kind = Kind.FIND_NODE, wanted: int = MAX_FOUND) -> Lookup:
    return Lookup(kind, KEY, US.id, 0.0, wanted=wanted)


def asked(effects: tuple[object, ...]) -> list[PeerId]:
    return [effect.peer.id for effect in effects if isinstance(effect, Ask)]


def test_the_specification_shows_the_table() -> None:
    text = (Path(kad.__file__).parent / "SPEC.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (ask|late|answer|fail) \| (\w+) \|$", text, re.M)
    shown = {(before, turn): after for before, turn, after in rows}
    assert shown == {(s.value, t.value): after.value for (s, t), after in TRANSITIONS.items()}


def test_a_walk_finds_the_nearest_of_a_network_that_nobody_knows_whole() -> None:
    """Everybody knows 30 peers at random and its own neighbours."""
    rng = random.Random(7)
    views = {}
    for one in CROWD:
        view = Table(one.id)
        for other in sorted(CROWD, key=lambda p: place_of(p.id) ^ place_of(one.id))[1:11] + rng.sample(CROWD, 30):
            view.answered(other)
        views[one.id] = view
    walk = lookup()
    waiting = list(walk.handle(Begin(tuple(rng.sample(CROWD, 3))), 0.0))
    questions = 0
    while True:
        effect = waiting.pop(0)
        if isinstance(effect, Done):
            break
        assert isinstance(effect, Ask)
        questions += 1
        waiting += walk.handle(Answered(effect.peer.id, views[effect.peer.id].nearest(place(KEY))), 0.0)
    assert effect.closest == tuple(NEAREST[:K])
    assert questions < 60
    assert walk.over and walk.deadline is None


def test_nobody_to_ask() -> None:
    (done,) = lookup().handle(Begin(()), 0.0)
    assert done == Done((), "nobody answered")


def test_us_and_peers_without_addresses_are_not_asked() -> None:
    (done,) = lookup().handle(Begin((US, Peer(CROWD[0].id))), 0.0)
    assert done == Done((), "nobody answered")


def test_failures_are_walked_around() -> None:
    walk = lookup()
    waiting = asked(walk.handle(Begin(tuple(NEAREST[:6])), 0.0))
    assert waiting == [p.id for p in NEAREST[:ALPHA]]
    done = None
    while waiting:
        one = waiting.pop(0)
        effects = walk.handle(Failed(one) if one == NEAREST[1].id else Answered(one), 1.0)
        waiting += asked(effects)
        done = effects[-1] if effects else done
    assert done == Done((NEAREST[0], *NEAREST[2:6]), "the nearest peers have answered")


def test_slow_peers_make_room() -> None:
    walk = lookup()
    walk.handle(Begin(tuple(NEAREST[:20])), 0.0)
    assert walk.deadline == SLOW_S
    total = ALPHA
    now = 0.0
    while total < MAX_UNDER_WAY:
        now += SLOW_S
        more = asked(walk.handle(Tick(), now))
        assert len(more) == min(ALPHA, MAX_UNDER_WAY - total)
        total += len(more)
    now += SLOW_S
    assert walk.handle(Tick(), now) == ()
    assert walk.deadline == LOOKUP_S
    # A late answer still counts.
    assert len(asked(walk.handle(Answered(NEAREST[0].id), now))) == 1
    (done,) = walk.handle(Tick(), LOOKUP_S)
    assert done == Done((NEAREST[0],), "60 s are over")
    assert walk.handle(Answered(NEAREST[1].id), now) == ()


def test_a_tick_at_the_deadline_moves_it() -> None:
    """Whatever the rounding: a deadline that stays where it is would wake the driver for ever."""
    for begin in (0.1, 1e5 / 3, 7e8 / 9):
        walk = Lookup(Kind.FIND_NODE, KEY, US.id, begin)
        walk.handle(Begin(tuple(NEAREST[:ALPHA])), begin)
        before = walk.deadline
        assert before is not None
        walk.handle(Tick(), before)
        assert walk.deadline is not None and walk.deadline > before


def test_a_peer_that_was_not_asked_can_not_answer() -> None:
    walk = lookup()
    walk.handle(Begin(tuple(NEAREST[:20])), 0.0)
    for one in (CROWD[-1], NEAREST[10]):
        with pytest.raises(LocalProtocolError):
            walk.handle(Answered(one.id), 0.0)
    walk.handle(Answered(NEAREST[0].id), 0.0)
    with pytest.raises(LocalProtocolError):
        walk.handle(Failed(NEAREST[0].id), 0.0)


def test_providers_are_told_once_and_again_with_addresses() -> None:
    walk = lookup(Kind.GET_PROVIDERS)
    walk.handle(Begin(tuple(NEAREST[:4])), 0.0)
    bare, placed = Peer(CROWD[0].id), CROWD[0]
    first = walk.handle(Answered(NEAREST[0].id, (), (bare, US)), 0.0)
    assert [e for e in first if isinstance(e, Found)] == [Found(bare)]
    second = walk.handle(Answered(NEAREST[1].id, (), (bare, placed)), 0.0)
    assert [e for e in second if isinstance(e, Found)] == [Found(placed)]
    third = walk.handle(Answered(NEAREST[2].id, (), (placed,)), 0.0)
    assert not [e for e in third if isinstance(e, Found)]


def test_enough_providers_end_the_walk() -> None:
    walk = lookup(Kind.GET_PROVIDERS, wanted=2)
    walk.handle(Begin(tuple(NEAREST[:4])), 0.0)
    effects = walk.handle(Answered(NEAREST[0].id, (), (CROWD[0], CROWD[1], CROWD[2])), 0.0)
    assert isinstance(effects[-1], Done) and effects[-1].reason == "enough providers were found"


def test_a_liar_that_invents_nearer_peers_is_left_behind() -> None:
    walk = lookup(Kind.GET_PROVIDERS)
    waiting = asked(walk.handle(Begin((NEAREST[0],)), 0.0))
    rounds = 0
    invented = 1000
    done = None
    while waiting:
        rounds += 1
        crowd = tuple(peer(invented + n) for n in range(30))
        invented += 30
        effects = walk.handle(Answered(waiting.pop(), crowd, crowd), 0.0)
        assert len(walk._candidates) <= MAX_CANDIDATES
        waiting += asked(effects)
        done = effects[-1] if effects else done
    assert isinstance(done, Done) and rounds <= MAX_ASKED
    assert len(walk._found) <= MAX_FOUND


def test_only_two_questions_walk() -> None:
    with pytest.raises(LocalProtocolError):
        Lookup(Kind.PUT_VALUE, KEY, US.id, 0.0)


def test_the_table_keeps_old_peers_and_forgets_those_that_fail() -> None:
    table = Table(US.id)
    for one in CROWD:
        table.answered(one)
    size = len(table)
    assert K < size <= K * BUCKETS
    assert table.nearest(place(KEY)) == tuple(p for p in NEAREST if p in table.nearest(0, 1000))[:K]
    far = [p for p in CROWD if (place_of(p.id) ^ place_of(US.id)) >> 255]
    assert len(far) > K
    kept, newcomer = far[0], far[-1]
    assert newcomer not in table.nearest(0, 1000)
    table.failed(kept.id)
    assert kept in table.nearest(0, 1000)
    table.answered(newcomer)
    assert newcomer in table.nearest(0, 1000) and kept not in table.nearest(0, 1000)
    for _ in range(MAX_FAILURES):
        table.failed(newcomer.id)
    assert newcomer not in table.nearest(0, 1000) and len(table) == size - 1
    table.answered(US)
    table.answered(Peer(kept.id))
    assert len(table) == size - 1
