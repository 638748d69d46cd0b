"""The rounds of one node: machine without I/O."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest

from protocols.delta.messages import Position
from protocols.errors import LocalProtocolError
from protocols.round import events
from protocols.round.events import Fetch, Input, Mix, Publish, Skip, Train
from protocols.round.machine import FETCH_S, TRANSITIONS, RoundMachine, Rules, State
from protocols.round.schedule import Mode
from tests.deltas import delta_cid, made, peer_of, record
from tests.vectors import PROTOCOLS

ANN, BOB, CAT, DAN = (peer_of(name) for name in ("ann", "bob", "cat", "dan"))


def machine(mode: Mode = Mode.PAIRWISE, **rules: Any) -> RoundMachine:
    return RoundMachine(ANN, Rules(lineage="lineage", mode=mode, **rules))


def arrived(name: str, round_number: int, exchange: int = 0, **fields: Any) -> events.Arrived:
    return events.Arrived(record(name, round_number, exchange, **fields))


def started(m: RoundMachine, *names: str) -> RoundMachine:
    """Ann trains round 1, beside these."""
    assert m.handle(events.Begin(), 0.0) == (Publish(Position(0, 0), ()),)
    for name in names:
        m.handle(arrived(name, 0), 0.0)
    assert m.handle(events.Published(), 0.0) == (Train(1),)
    return m


def exchanging(*names: str, **rules: Any) -> tuple[RoundMachine, tuple[events.Effect, ...]]:
    """Ann has published round 1."""
    m = started(machine(**rules), *names)
    assert m.handle(events.Trained(), 1.0) == (Publish(Position(1, 0), ()),)
    return m, m.handle(events.Published(), 2.0)


def test_two_nodes_exchange_and_go_on() -> None:
    m, effects = exchanging("bob")
    assert effects == ()
    assert (m.state, m.deadline) == (State.EXCHANGING, 62.0)
    assert m.handle(arrived("bob", 1), 3.0) == (Fetch(BOB, delta_cid("bob", 1)),)
    given = Input(BOB, Position(1, 0), delta_cid("bob", 1), Fraction(1, 2), 0)
    assert m.handle(events.Fetched(BOB, delta_cid("bob", 1)), 4.0) == (Mix((given,)),)
    assert m.handle(events.Mixed(), 5.0) == (Train(2),)
    assert m.handle(events.Trained(), 6.0) == (Publish(Position(2, 0), (given,)),)


def test_a_partner_that_was_faster_is_not_waited_for() -> None:
    m = started(machine(), "bob")
    m.handle(arrived("bob", 1), 0.5)
    m.handle(events.Trained(), 1.0)
    assert m.handle(events.Published(), 2.0) == (Fetch(BOB, delta_cid("bob", 1)),)


def test_four_nodes_need_two_exchanges_for_the_mean() -> None:
    m, _ = exchanging("bob", "cat", "dan")
    for name in ("bob", "cat", "dan"):
        m.handle(arrived(name, 1), 3.0)
    (fetch,) = [name for name in ("bob", "cat", "dan") if m._partners._wants.get(peer_of(name))]  # type: ignore[union-attr]
    m.handle(events.Fetched(peer_of(fetch), delta_cid(fetch, 1)), 4.0)
    (publish,) = m.handle(events.Mixed(), 5.0)
    assert isinstance(publish, Publish)
    assert publish.position == Position(1, 1)
    assert [given.peer for given in publish.mixed] == [peer_of(fetch)]
    assert m.handle(events.Published(), 6.0) == ()
    others = [name for name in ("bob", "cat", "dan") if name != fetch]
    effects = [effect for name in others for effect in m.handle(arrived(name, 1, 1), 7.0)]
    assert len(effects) == 1
    (fetch,) = [name for name in others if effects == [Fetch(peer_of(name), delta_cid(name, 1, 1))]]
    m.handle(events.Fetched(peer_of(fetch), delta_cid(fetch, 1, 1)), 8.0)
    assert m.handle(events.Mixed(), 9.0) == (Train(2),)


def test_one_mix_a_round_is_enough_when_the_rules_say_so() -> None:
    m, _ = exchanging("bob", "cat", "dan", mixes=1)
    for name in ("bob", "cat", "dan"):
        for effect in m.handle(arrived(name, 1), 3.0):
            assert isinstance(effect, Fetch)
            m.handle(events.Fetched(effect.peer, effect.delta), 4.0)
    assert m.handle(events.Mixed(), 5.0) == (Train(2),)


def test_a_late_partner_is_passed_over_after_its_older_delta_was_looked_for() -> None:
    m, _ = exchanging("bob")
    assert m.handle(events.Expired(), 62.0) == (Fetch(BOB, delta_cid("bob", 0)),)
    assert m.deadline == 62.0 + FETCH_S
    (mix,) = m.handle(events.Fetched(BOB, delta_cid("bob", 0)), 63.0)
    assert isinstance(mix, Mix)
    assert mix.inputs[0].staleness == 1
    assert m.handle(events.Mixed(), 64.0) == (Train(2),)
    m.handle(events.Trained(), 65.0)
    m.handle(events.Published(), 66.0)
    skip, train = m.handle(events.Expired(), 126.0)
    assert skip == Skip(BOB, "it was late, and has no older delta that we have not taken")
    assert train == Train(3)


def test_a_delta_that_does_not_come_is_given_up() -> None:
    m, _ = exchanging("bob")
    m.handle(arrived("bob", 1), 3.0)
    assert m.handle(events.Expired(), 62.0) == ()
    assert m.handle(events.Expired(), 92.0) == (Skip(BOB, "its delta did not come"), Train(2))
    assert m.handle(events.Fetched(BOB, delta_cid("bob", 1)), 93.0) == ()  # too late, and harmless


def test_a_refused_delta_costs_only_the_exchange() -> None:
    m, _ = exchanging("bob")
    m.handle(arrived("bob", 1), 3.0)
    assert m.handle(events.Refused(BOB, delta_cid("bob", 0), "old"), 4.0) == ()  # one that nobody waits for
    assert m.handle(events.Refused(BOB, delta_cid("bob", 1), "worse"), 4.0) == (Skip(BOB, "worse"), Train(2))


def test_a_partner_that_leaves_is_not_waited_for() -> None:
    m, _ = exchanging("bob")
    assert m.handle(events.Left(BOB), 3.0) == (Skip(BOB, "it has left"), Train(2))
    assert m.participants == (ANN,)


def test_alone_it_trains_on() -> None:
    m = machine()
    m.handle(events.Begin(), 0.0)
    assert m.handle(events.Published(), 0.0) == ()
    assert (m.state, m.deadline) == (State.GATHERING, 60.0)
    assert m.handle(events.Expired(), 60.0) == (Train(1),)
    m.handle(events.Trained(), 70.0)
    assert m.handle(events.Published(), 71.0) == (Train(2),)


def test_the_first_waits_for_the_second() -> None:
    m = machine(least=3)
    m.handle(events.Begin(), 0.0)
    m.handle(events.Published(), 0.0)
    assert m.handle(arrived("bob", 0), 1.0) == ()
    assert m.handle(arrived("cat", 0), 1.0) == (Train(1),)


def test_a_newcomer_takes_what_others_have() -> None:
    m = machine()
    for name, number in (("bob", 9), ("cat", 9), ("dan", 2)):
        m.handle(arrived(name, number), 0.0)
    assert m.round == 9
    fetches = m.handle(events.Begin(), 0.0)
    assert set(fetches) == {Fetch(BOB, delta_cid("bob", 9)), Fetch(CAT, delta_cid("cat", 9))}
    assert m.handle(events.Fetched(BOB, delta_cid("bob", 9)), 1.0) == ()
    (mix,) = m.handle(events.Refused(CAT, delta_cid("cat", 9), "gone"), 1.0)[1:]
    assert isinstance(mix, Mix)
    assert mix.adopts
    assert [given.peer for given in mix.inputs] == [BOB]
    assert m.handle(events.Mixed(), 2.0) == (Publish(Position(9, 0), mix.inputs),)
    assert m.handle(events.Published(), 2.0) == (Train(10),)


def test_a_newcomer_whom_nobody_gives_anything_starts_with_what_it_has() -> None:
    m = machine()
    m.handle(arrived("bob", 9), 0.0)
    m.handle(events.Begin(), 0.0)
    assert m.handle(events.Expired(), 30.0) == (Skip(BOB, "its delta did not come"), Publish(Position(9, 0), ()))


def test_after_a_short_absence_it_goes_on_with_its_own() -> None:
    m = machine()
    m.handle(arrived("bob", 9), 0.0)
    assert m.handle(events.Begin(after=7), 0.0) == (Publish(Position(9, 0), ()),)
    again = machine()
    again.handle(arrived("bob", 7), 0.0)
    assert again.handle(events.Begin(after=7), 0.0) == (Publish(Position(8, 0), ()),), "no round is done twice"


def test_who_fell_behind_goes_on_where_most_are() -> None:
    m = started(machine(), "bob", "cat")
    m.handle(arrived("bob", 4), 1.0)
    m.handle(arrived("cat", 4), 1.0)
    m.handle(events.Trained(), 2.0)
    m.handle(events.Published(), 2.0)
    while m.state is not State.TRAINING:
        m.handle(events.Expired(), 3.0)
        for name in ("bob", "cat"):
            m.handle(events.Refused(peer_of(name), delta_cid(name, 4), "no"), 3.0)
        if m.state is State.PUBLISHING:
            m.handle(events.Published(), 3.0)
    assert m.position.round == 4


def test_who_was_away_for_long_comes_back_as_a_newcomer() -> None:
    m = started(machine(), "bob", "cat")
    for name in ("bob", "cat"):
        m.handle(arrived(name, 30), 1.0)
    m.handle(events.Trained(), 2.0)
    assert set(m.handle(events.Published(), 2.0)) == {
        Fetch(peer_of(name), delta_cid(name, 30)) for name in ("bob", "cat")
    }
    assert (m.state, m.position.round) == (State.ADOPTING, 30)


def test_when_most_are_there_one_that_is_behind_is_not_waited_for() -> None:
    m = started(machine(mode=Mode.GROUP), "bob", "cat", "dan")
    for number in (1, 2):
        m.handle(events.Trained(), 1.0)
        m.handle(events.Published(), 2.0)
        for name in ("bob", "cat"):
            m.handle(arrived(name, number), 3.0)
            m.handle(events.Fetched(peer_of(name), delta_cid(name, number)), 3.0)
        if number == 1:
            assert m.handle(events.Expired(), 62.0) == (Fetch(DAN, delta_cid("dan", 0)),)
            m.handle(events.Fetched(DAN, delta_cid("dan", 0)), 63.0)
        assert m.state is State.MIXING
        m.handle(events.Mixed(), 64.0)


def test_nobody_runs_away_from_the_others() -> None:
    m = started(machine(wait_s=5.0), "bob", "cat")
    while m.state is State.TRAINING:
        m.handle(events.Trained(), 1.0)
        while m.state in (State.EXCHANGING, State.PUBLISHING, State.MIXING):
            m.handle(events.Published() if m.state is State.PUBLISHING else events.Expired(), 2.0)
    assert (m.state, m.position.round, m.deadline) == (State.GATHERING, 4, 7.0)
    m.handle(arrived("bob", 3), 6.0)
    assert m.handle(arrived("cat", 3), 6.0) == ()
    assert m.state is State.TRAINING


def test_one_that_claims_a_later_round_moves_nobody() -> None:
    m = started(machine(), "bob", "cat")
    m.handle(arrived("cat", 1 << 40), 1.0)
    assert m.round == 1
    assert m.participants == tuple(sorted((ANN, BOB)))


def test_stop_ends_everything() -> None:
    m, _ = exchanging("bob")
    assert m.handle(events.Stop(), 3.0) == ()
    assert (m.state, m.deadline) == (State.RESTING, None)
    assert m.handle(arrived("bob", 1), 4.0) == ()


def broadcasting(*names: str) -> RoundMachine:
    return exchanging(*names, mode=Mode.BROADCAST)[0]


def whole(name: str, number: int) -> dict[str, Any]:
    return {"adds": True, "whole": made(f"{name} whole", number)}


def test_broadcast_adds_every_change_once() -> None:
    m = broadcasting("bob", "cat")
    fetched = []
    for name in ("bob", "cat", "bob"):
        for effect in m.handle(arrived(name, 1, recent=1, **whole(name, 1)), 3.0):
            assert isinstance(effect, Fetch)
            fetched.append(effect)
    assert {fetch.delta for fetch in fetched} == {delta_cid(name, 1) for name in ("bob", "cat")}
    m.handle(events.Fetched(BOB, delta_cid("bob", 1)), 3.0)
    (mix,) = m.handle(events.Fetched(CAT, delta_cid("cat", 1)), 3.0)
    assert isinstance(mix, Mix)
    assert [(given.peer, given.weight) for given in mix.inputs if given.position.round] == [
        (peer, Fraction(1)) for peer in sorted((BOB, CAT))
    ]
    assert m.handle(events.Mixed(), 4.0) == (Train(2),)


def test_what_is_late_in_a_broadcast_is_added_later() -> None:
    m = broadcasting("bob", "cat")
    for effect in m.handle(arrived("bob", 1, **whole("bob", 1)), 3.0):
        assert isinstance(effect, Fetch)
        m.handle(events.Fetched(effect.peer, effect.delta), 3.0)
    skip, mix = m.handle(events.Expired(), 62.0)
    assert skip == Skip(CAT, "it was late; its change is added when it comes")
    m.handle(events.Mixed(), 63.0)
    m.handle(arrived("cat", 1, **whole("cat", 1)), 64.0)
    m.handle(events.Fetched(CAT, delta_cid("cat", 1)), 65.0)
    m.handle(events.Trained(), 66.0)
    m.handle(events.Published(), 67.0)
    m.handle(arrived("bob", 2, **whole("bob", 2)), 68.0)
    m.handle(arrived("cat", 2, recent=1, **whole("cat", 2)), 68.0)
    m.handle(events.Fetched(BOB, delta_cid("bob", 2)), 68.0)
    (mix,) = m.handle(events.Fetched(CAT, delta_cid("cat", 2)), 68.0)
    assert isinstance(mix, Mix)
    assert [(given.peer, given.position.round) for given in mix.inputs] == [
        (CAT, 1), *((peer, 2) for peer in sorted((BOB, CAT))),
    ]  # fmt: skip


def test_a_newcomer_to_a_broadcast_takes_one_whole_adapter() -> None:
    m = machine(Mode.BROADCAST)
    m.handle(arrived("bob", 9, recent=8, **whole("bob", 9)), 0.0)
    (fetch,) = m.handle(events.Begin(), 0.0)
    assert fetch == Fetch(BOB, delta_cid("bob whole", 9))
    (mix,) = m.handle(events.Fetched(BOB, delta_cid("bob whole", 9)), 0.0)
    assert isinstance(mix, Mix)
    assert mix.adopts
    m.handle(events.Mixed(), 0.0)
    m.handle(events.Published(), 0.0)
    assert m.handle(arrived("bob", 10, recent=8, **whole("bob", 10)), 1.0) == (
        Fetch(BOB, delta_cid("bob", 10)),
        Fetch(BOB, delta_cid("bob", 9)),
    )


def test_what_a_state_does_not_expect_changes_nothing() -> None:
    m = machine()
    with pytest.raises(LocalProtocolError, match="does not expect Trained while resting"):
        m.handle(events.Trained(), 0.0)
    assert m.state is State.RESTING


def test_the_table_is_that_of_the_specification() -> None:
    text = (PROTOCOLS / "round/SPEC.md").read_text()
    table = re.findall(r"^\| (\w+) \| (\w+) \| ([\w, ]+) \|$", text.split("<!-- transitions -->")[1], re.MULTILINE)
    said = {(state, event): set(after.replace(" or ", ", ").split(", ")) for state, event, after in table[1:]}
    explicit = {key: states for key, states in TRANSITIONS.items() if key[1] is not events.Stop}
    assert said == {
        (state.value, event.__name__): {s.value for s in after}
        for (state, event), after in explicit.items()
        if after != (state,) or event not in (events.Arrived, events.Left, events.Fetched, events.Refused)
    }
