"""Roll-outs: any words are checked and counted without another error; who heard the same decides the same."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.codec import decode, encode
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.rollout.events import Answered, Expired, Heard, NotJudged, RolledBack
from protocols.rollout.memory import RELEASED, Memory
from protocols.rollout.messages import (
    Ballots,
    Candidate,
    Candidates,
    Content,
    Revocations,
    Tallies,
    Tally,
    candidate_id,
    check_content,
)
from protocols.rollout.weights import MOST, weights
from tests.adverts import peer_of
from tests.rollouts import SERVED, Town, candidate_of, revocation_of, vote_of
from tests.wire import messages, survives

PEERS = ("a", "b", "c", "d", "e")
FIRST = [candidate_of("x"), candidate_of("y")]
LATER = [candidate_of(f"{one.adapter[-4:]}-{n}", 2 + n, one.adapter) for one in FIRST for n in (0, 1)]
EVERY = [*FIRST, *LATER]

contents: st.SearchStrategy[Content] = (
    messages(Candidates) | messages(Ballots) | messages(Tallies) | messages(Revocations)
)


@settings(max_examples=200)
@given(contents)
def test_any_content_is_checked_without_another_error(content: Content) -> None:
    with suppress(RemoteProtocolError):
        check_content(content, peer_of(1))


@given(st.sampled_from([Candidates, Ballots, Tallies, Revocations, Memory]), st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(cls: type[Any], data: bytes) -> None:
    survives(data, lambda raw: decode(cls, raw), encode)


@given(st.dictionaries(st.integers(0, 60), st.integers(0, 12), min_size=1))
def test_no_branch_has_more_than_its_part(branches: dict[int, int]) -> None:
    weight = weights({PeerId(str(voter)): PeerId(str(branch)) for voter, branch in branches.items()})
    of_branch: dict[int, int] = {}
    for voter, branch in branches.items():
        of_branch[branch] = of_branch.get(branch, 0) + weight[PeerId(str(voter))]
    part = max(sum(weight.values()) / MOST, sum(weight.values()) / len(of_branch))
    assert all(of <= part + len(branches) for of in of_branch.values())
    assert all(of > 0 for of in weight.values())


candidates = st.sampled_from(EVERY)
heard = st.one_of(
    st.tuples(st.just("propose"), st.sampled_from(PEERS), candidates),
    st.tuples(st.just("vote"), st.sampled_from(PEERS), candidates, st.sampled_from([-0.02, 0.0, 0.05])),
    st.tuples(st.just("report"), st.sampled_from(PEERS), candidates, st.integers(0, 99), st.booleans()),
)
words = heard | st.one_of(
    st.tuples(st.just("revoke"), st.sampled_from(PEERS), candidates),
    st.tuples(st.just("answer"), candidates, st.booleans()),
    st.tuples(st.just("back"), candidates),
    st.tuples(st.just("hear")),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 100.0, 2000.0])),
    st.tuples(st.just("restart")),
)


def tell(town: Town, word: Any) -> None:
    match word:
        case "propose", who, one:
            town.propose(one, by=who)
        case "vote", who, one, delta:
            before = town.said.get((who, Ballots))
            kept = () if not isinstance(before, Ballots) else before.votes
            kept = tuple(vote for vote in kept if vote.candidate != candidate_id(one))
            town.said[who, Ballots] = Ballots(votes=(vote_of(one, delta), *kept))
        case "revoke", who, one:
            town.said[who, Revocations] = Revocations(revoked=(revocation_of(one),))
        case "report", who, one, wrong, released:
            tally = Tally(candidate=one, released=released, right=100, wrong=wrong)
            town.said[who, Tallies] = Tallies(base=SERVED.base, seen=(tally,))
        case "answer", one, wrong:
            town.handle(Answered(one.adapter, wrong))
        case "back", one:
            town.handle(RolledBack(one.adapter, "by hand"))
        case ("hear",):
            town.hear()
        case "wait", seconds:
            town.pass_time(seconds)
        case ("restart",):
            town.restart(decode(Memory, encode(town.machine.memory())))
        case _:
            raise AssertionError(word)


def gone(town: Town) -> set[str]:
    return {one.adapter for one in town.machine.memory().gone}


@settings(max_examples=150, deadline=None)
@given(st.lists(words, max_size=40))
def test_whatever_is_said_the_rules_hold(said: list[Any]) -> None:
    town = Town(PEERS)
    before: set[str] = set()
    for word in said:
        tell(town, word)
        assert before <= gone(town), "a revocation was forgotten"
        before = gone(town)
        current = town.machine.current
        assert current is None or (current.adapter not in before and current.previous not in before)
        assert current is None or current.adapter in town.machine.kept
        town.pass_time(0)  # ends: a machine that has been woken does not ask for it again at once
        memory = town.machine.memory()
        assert all(known.in_use <= (known.step > 0) for known in memory.known)
        assert all(known.candidate in EVERY and known.step <= RELEASED for known in memory.known)
        town.machine.releases()


@settings(max_examples=60, deadline=None)
@given(st.lists(heard, max_size=30), st.randoms(use_true_random=False))
def test_whoever_hears_the_same_releases_the_same(said: list[Any], rng: random.Random) -> None:
    heads: set[Candidate | None] = set()
    for us in ("n", "o"):
        town = Town(PEERS, us=us, others=("n", "o"))
        for word in said:
            tell(town, word)
        town.said = dict(rng.sample(list(town.said.items()), len(town.said)))
        town.hear()
        town.pass_time(60_000)
        heads.add(town.machine.head)
    assert len(heads) == 1


@settings(max_examples=100)
@given(st.lists(st.sampled_from(PEERS), min_size=2, max_size=5, unique=True), st.floats(0, 1e6))
def test_old_events_do_no_harm(peers: list[str], now: float) -> None:
    town = Town(tuple(peers))
    for event in (NotJudged(candidate_id(FIRST[0])), Expired(), Heard(town.count()), Answered("", wrong=True)):
        town.now = now
        town.handle(event)
    assert town.machine.current is None
