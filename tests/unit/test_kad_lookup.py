"""The walk towards a key, the table and the answering side, without I/O."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from protocols.errors import LocalProtocolError
from protocols.ids import PeerId, base58_encode
from protocols.kad import lookup as kad
from protocols.kad.messages import Kind, Peer, place, place_of
from protocols.kad.table import BUCKETS, MAX_FAILURES, Table

KEY = b"\x12\x20" + bytes([1] * 32)


def peer(number: int, *addresses: str) -> Peer:
    name = PeerId(base58_encode(b"\x12\x20" + number.to_bytes(32, "big")))
    return Peer(name, addresses or (f"/ip4/10.0.{number >> 8 & 255}.{number & 255}/tcp/4331",))


US = peer(0)
CROWD = [peer(number) for number in range(1, 400)]
NEAREST = sorted(CROWD, key=lambda p: place_of(p.id) ^ place(KEY))


def lookup(kind: Kind = Kind.FIND_NODE, wanted: int = kad.MAX_FOUND) -> kad.Lookup:
    return kad.Lookup(kind, KEY, US.id, 0.0, wanted=wanted)


def asked(effects: tuple[object, ...]) -> list[PeerId]:
    return [effect.peer.id for effect in effects if isinstance(effect, kad.Ask)]


def test_the_specification_shows_the_table() -> None:
    text = (Path(kad.__file__).parent / "SPEC.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (ask|late|answer|fail) \| (\w+) \|$", text, re.M)
    shown = {(before, turn): after for before, turn, after in rows}
    assert shown == {(s.value, t.value): after.value for (s, t), after in kad.TRANSITIONS.items()}


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
    waiting = list(walk.handle(kad.Begin(tuple(rng.sample(CROWD, 3))), 0.0))
    questions = 0
    while True:
        effect = waiting.pop(0)
        if isinstance(effect, kad.Done):
            break
        assert isinstance(effect, kad.Ask)
        questions += 1
        waiting += walk.handle(kad.Answered(effect.peer.id, views[effect.peer.id].nearest(place(KEY))), 0.0)
    assert effect.closest == tuple(NEAREST[: kad.K])
    assert questions < 60
    assert walk.over and walk.deadline is None


def test_nobody_to_ask() -> None:
    (done,) = lookup().handle(kad.Begin(()), 0.0)
    assert done == kad.Done((), "nobody answered")


def test_us_and_peers_without_addresses_are_not_asked() -> None:
    (done,) = lookup().handle(kad.Begin((US, Peer(CROWD[0].id))), 0.0)
    assert done == kad.Done((), "nobody answered")


def test_failures_are_walked_around() -> None:
    walk = lookup()
    waiting = asked(walk.handle(kad.Begin(tuple(NEAREST[:6])), 0.0))
    assert waiting == [p.id for p in NEAREST[: kad.ALPHA]]
    done = None
    while waiting:
        one = waiting.pop(0)
        effects = walk.handle(kad.Failed(one) if one == NEAREST[1].id else kad.Answered(one), 1.0)
        waiting += asked(effects)
        done = effects[-1] if effects else done
    assert done == kad.Done((NEAREST[0], *NEAREST[2:6]), "the nearest peers have answered")


def test_slow_peers_make_room() -> None:
    walk = lookup()
    walk.handle(kad.Begin(tuple(NEAREST[:20])), 0.0)
    assert walk.deadline == kad.SLOW_S
    total = kad.ALPHA
    now = 0.0
    while total < kad.MAX_UNDER_WAY:
        now += kad.SLOW_S
        more = asked(walk.handle(kad.Tick(), now))
        assert len(more) == min(kad.ALPHA, kad.MAX_UNDER_WAY - total)
        total += len(more)
    now += kad.SLOW_S
    assert walk.handle(kad.Tick(), now) == ()
    assert walk.deadline == kad.LOOKUP_S
    # A late answer still counts.
    assert len(asked(walk.handle(kad.Answered(NEAREST[0].id), now))) == 1
    (done,) = walk.handle(kad.Tick(), kad.LOOKUP_S)
    assert done == kad.Done((NEAREST[0],), "60 s are over")
    assert walk.handle(kad.Answered(NEAREST[1].id), now) == ()


def test_a_tick_at_the_deadline_moves_it() -> None:
    """Whatever the rounding: a deadline that stays where it is would wake the driver for ever."""
    for begin in (0.1, 1e5 / 3, 7e8 / 9):
        walk = kad.Lookup(Kind.FIND_NODE, KEY, US.id, begin)
        walk.handle(kad.Begin(tuple(NEAREST[: kad.ALPHA])), begin)
        before = walk.deadline
        assert before is not None
        walk.handle(kad.Tick(), before)
        assert walk.deadline is not None and walk.deadline > before


def test_a_peer_that_was_not_asked_can_not_answer() -> None:
    walk = lookup()
    walk.handle(kad.Begin(tuple(NEAREST[:20])), 0.0)
    for one in (CROWD[-1], NEAREST[10]):
        with pytest.raises(LocalProtocolError):
            walk.handle(kad.Answered(one.id), 0.0)
    walk.handle(kad.Answered(NEAREST[0].id), 0.0)
    with pytest.raises(LocalProtocolError):
        walk.handle(kad.Failed(NEAREST[0].id), 0.0)


def test_providers_are_told_once_and_again_with_addresses() -> None:
    walk = lookup(Kind.GET_PROVIDERS)
    walk.handle(kad.Begin(tuple(NEAREST[:4])), 0.0)
    bare, placed = Peer(CROWD[0].id), CROWD[0]
    first = walk.handle(kad.Answered(NEAREST[0].id, (), (bare, US)), 0.0)
    assert [e for e in first if isinstance(e, kad.Found)] == [kad.Found(bare)]
    second = walk.handle(kad.Answered(NEAREST[1].id, (), (bare, placed)), 0.0)
    assert [e for e in second if isinstance(e, kad.Found)] == [kad.Found(placed)]
    third = walk.handle(kad.Answered(NEAREST[2].id, (), (placed,)), 0.0)
    assert not [e for e in third if isinstance(e, kad.Found)]


def test_enough_providers_end_the_walk() -> None:
    walk = lookup(Kind.GET_PROVIDERS, wanted=2)
    walk.handle(kad.Begin(tuple(NEAREST[:4])), 0.0)
    effects = walk.handle(kad.Answered(NEAREST[0].id, (), (CROWD[0], CROWD[1], CROWD[2])), 0.0)
    assert isinstance(effects[-1], kad.Done) and effects[-1].reason == "enough providers were found"


def test_a_liar_that_invents_nearer_peers_is_left_behind() -> None:
    walk = lookup(Kind.GET_PROVIDERS)
    waiting = asked(walk.handle(kad.Begin((NEAREST[0],)), 0.0))
    rounds = 0
    invented = 1000
    done = None
    while waiting:
        rounds += 1
        crowd = tuple(peer(invented + n) for n in range(30))
        invented += 30
        effects = walk.handle(kad.Answered(waiting.pop(), crowd, crowd), 0.0)
        assert len(walk._candidates) <= kad.MAX_CANDIDATES
        waiting += asked(effects)
        done = effects[-1] if effects else done
    assert isinstance(done, kad.Done) and rounds <= kad.MAX_ASKED
    assert len(walk._found) <= kad.MAX_FOUND


def test_only_two_questions_walk() -> None:
    with pytest.raises(LocalProtocolError):
        kad.Lookup(Kind.PUT_VALUE, KEY, US.id, 0.0)


def test_the_table_keeps_old_peers_and_forgets_those_that_fail() -> None:
    table = Table(US.id)
    for one in CROWD:
        table.answered(one)
    size = len(table)
    assert kad.K < size <= kad.K * BUCKETS
    assert table.nearest(place(KEY)) == tuple(p for p in NEAREST if p in table.nearest(0, 1000))[: kad.K]
    far = [p for p in CROWD if (place_of(p.id) ^ place_of(US.id)) >> 255]
    assert len(far) > kad.K
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
