"""Roll-outs of adapters: what votes say, whose turn it is, what ends it, and what is remembered."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocols.codec import decode, encode
from protocols.errors import RemoteProtocolError
from protocols.ids import RAW, PeerId, cid_of
from protocols.rollout.count import MAX_COUNTED, Stand
from protocols.rollout.events import Answered, Judge, Judged, NotJudged, Proposed, Remember, RolledBack, Say, Serving
from protocols.rollout.machine import Rollout
from protocols.rollout.memory import Memory
from protocols.rollout.messages import (
    LIVE_ERRORS,
    PERSON,
    Ballots,
    Candidates,
    Content,
    Revocation,
    Revocations,
    Tallies,
    Tally,
    Version,
    candidate_id,
    check_content,
    draw,
    suite_seed,
)
from protocols.rollout.sprt import are_stopped, is_stopped, likelihood, usual_rate
from protocols.rollout.state import Phase
from protocols.rollout.weights import ONE, upper_median, weights
from tests.adverts import peer_of
from tests.rollouts import PACE, SERVED, Town, block, candidate_of, revocation_of, vote_of
from tests.vectors import PROTOCOLS, Case, hold

ONE_OF = candidate_of("one")
TEN = tuple(f"voter-{number}" for number in range(10))


def opened(data: bytes) -> Content:
    """Contents have no tag: the notice says which it is. Vectors are told apart by trying."""
    errors = []
    for cls in (Candidates, Ballots, Tallies, Revocations):
        try:
            content = decode(cls, data)
            check_content(content, peer_of(1))
        except RemoteProtocolError as error:
            errors.append(error)
        else:
            return content
    raise errors[0]


def test_vectors() -> None:
    second = candidate_of("two", 2, ONE_OF.adapter, round=7, parents=(cid_of(RAW, b"delta"),))
    good: dict[str, Content] = {
        "two candidates": Candidates(proposed=(second, ONE_OF)),
        "a vote": Ballots(votes=(vote_of(ONE_OF, -0.02),)),
        "what was seen": Tallies(
            base=SERVED.base, seen=(Tally(candidate=ONE_OF, released=True, right=19, wrong=1), Tally(right=5))
        ),
        "a revocation for its errors": Revocations(
            revoked=(
                Revocation(
                    adapter=ONE_OF.adapter, ground=LIVE_ERRORS, why="errors", right=80, wrong=20, usual=50_000
                ),
            )
        ),
    }
    bad: dict[str, Content] = {
        "an adapter that is no dag-cbor block": Candidates(
            proposed=(replace(ONE_OF, adapter=cid_of(RAW, b"adapter")),)
        ),
        "a version that counts nothing": Candidates(proposed=(replace(ONE_OF, version="v1.0.0-0"),)),
        "a version with a zero in front": Candidates(proposed=(replace(ONE_OF, version="v1.0.0-01"),)),
        "it replaces itself": Candidates(proposed=(replace(ONE_OF, previous=ONE_OF.adapter),)),
        "the same candidate twice": Candidates(proposed=(ONE_OF, ONE_OF)),
        "a vote on an adapter": Ballots(votes=(replace(vote_of(ONE_OF, 0), candidate=ONE_OF.adapter),)),
        "two votes on one candidate": Ballots(votes=(vote_of(ONE_OF, 0), vote_of(ONE_OF, 1))),
        "a tally of another model": Tallies(base=block("other"), seen=(Tally(candidate=ONE_OF),)),
        "no such ground": Revocations(revoked=(revocation_of(ONE_OF, "anger"),)),
        "a reason that rings a bell": Revocations(revoked=(replace(revocation_of(ONE_OF), why="\a"),)),
    }
    cases = [Case(name, encode(content), content) for name, content in good.items()]
    cases += [Case(name, encode(content)) for name, content in bad.items()]
    hold("rollout", [*cases, Case("cut off", encode(good["a vote"])[:-1])], opened)


def test_the_specification_names_the_constants() -> None:
    text = (PROTOCOLS / "rollout/SPEC.md").read_text()
    for name in ("SHARES", "LEAST_VOTES", "QUORUM", "THIRD", "BETTER", "LEAST_SAMPLES", "MAX_COUNTED", "MAX_GONE"):
        assert f"`{name}`" in text


# ---------------------------------------------------------------- counting


def test_versions_count() -> None:
    assert Version.parse("v1.2.3-4") == (1, 2, 3, 4) and str(Version.parse("v1.2.3")) == "v1.2.3-0"
    for text in ("1.2.3-4", "v1.2-4", "v1.2.3-", "v01.2.3-4", "v1.2.3-4 "):
        with pytest.raises(RemoteProtocolError):
            Version.parse(text)


def test_seeds_differ_by_candidate_and_voter() -> None:
    two = candidate_id(candidate_of("two"))
    seeds = {suite_seed(cid, voter) for cid in (candidate_id(ONE_OF), two) for voter in TEN}
    assert len(seeds) == 20 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert len({draw(candidate_id(ONE_OF), voter) for voter in TEN}) == 10


def test_a_branch_has_a_quarter_at_most() -> None:
    branches = {f"made-up-{n}": "inviter" for n in range(50)} | {f"honest-{n}": f"honest-{n}" for n in range(5)}
    weight = weights({PeerId(voter): PeerId(branch) for voter, branch in branches.items()})
    made_up = sum(of for voter, of in weight.items() if voter.startswith("made"))
    assert made_up * 4 <= sum(weight.values())
    assert {of for voter, of in weight.items() if voter.startswith("honest")} == {ONE}


def test_few_branches_count_the_same() -> None:
    weight = weights({PeerId("a"): PeerId("a"), PeerId("b"): PeerId("b"), PeerId("c"): PeerId("b")})
    assert weight == {"a": ONE, "b": ONE // 2, "c": ONE // 2}


def test_the_upper_median() -> None:
    assert upper_median([(3, 1), (1, 1), (2, 1)]) == 2
    assert upper_median([(1, 1), (2, 1)]) == 2
    assert upper_median([(1, 3), (2, 2)]) == 1


def stand_of(town: Town) -> Stand:
    return town.count().of[candidate_id(ONE_OF)].stand


def test_it_takes_three_votes_or_all() -> None:
    for voters, needed in (("a", 1), ("ab", 2), ("abc", 3), ("abcd", 3), ("abcdefghijklmnopqrstuvwxyz", 6)):
        town = Town(tuple(voters))
        town.propose(ONE_OF)
        for number, voter in enumerate(voters[:needed]):
            assert stand_of(town) is Stand.OPEN, (voters, number)
            town.vote([voter], vote_of(ONE_OF, -0.02))
        assert stand_of(town) in (Stand.GOOD, Stand.SURE), voters


@pytest.mark.parametrize(
    ("deltas", "stand"),
    [
        ([-0.02] * 3, Stand.GOOD),
        ([-0.02] * 4, Stand.SURE),
        ([-0.001] * 5, Stand.NO_BETTER),
        ([-0.02, -0.02, -0.02, 0.05, 0.05], Stand.NO_BETTER),  # two of five find it clearly worse
        ([-0.02, -0.02, -0.02, -0.02, 0.05, 0.05], Stand.SURE),
        ([0.05] * 5, Stand.NO_BETTER),
        ([0.05] * 6, Stand.WORSE),
    ],
)
def test_what_the_votes_of_ten_say(deltas: list[float], stand: Stand) -> None:
    town = Town(TEN)
    town.propose(ONE_OF)
    for voter, delta in zip(TEN, deltas, strict=False):
        town.vote([voter], vote_of(ONE_OF, delta))
    assert stand_of(town) is stand


def test_a_vote_on_too_few_samples_does_not_count() -> None:
    town = Town(("a",))
    town.propose(ONE_OF)
    town.vote("a", vote_of(ONE_OF, -0.5, samples=7))
    assert stand_of(town) is Stand.OPEN


def test_devices_that_one_inviter_made_up_do_not_outvote_the_rest() -> None:
    made_up = tuple(f"made-up-{number}" for number in range(30))
    town = Town((*TEN, *made_up), branches=dict.fromkeys(made_up, "made-up-0"))
    town.propose(ONE_OF)
    town.vote(made_up, vote_of(ONE_OF, -0.5))
    town.vote(TEN[:6], vote_of(ONE_OF, 0.01))
    assert stand_of(town) is Stand.NO_BETTER
    town.revoke(made_up, ONE_OF)
    assert not town.count().revoked


# ---------------------------------------------------------------- rolling out


def released(town: Town, one: object = ONE_OF) -> bool:
    return town.machine.head == one and town.machine.current == one


def test_the_first_node_of_four_uses_it_first_and_all_in_the_end() -> None:
    steps = {}
    for us in ("a", "b", "c", "d"):
        town = Town(("a", "b", "c", "d"), us=us)
        town.propose(ONE_OF, by="b")
        town.vote("abcd", vote_of(ONE_OF, -0.02))
        town.hear()
        assert town.machine.current is None
        for number in range(5):
            town.pass_time(PACE.collect_s if number == 0 else PACE.soak_s)
            if town.machine.current == ONE_OF:
                steps.setdefault(us, number)
        assert released(town)
        assert town.uses() == [ONE_OF]
    assert sorted(steps.values()) == [0, 2, 3, 3]  # 5 % and 25 % of four are one node, 50 % two


def test_votes_that_turn_take_it_back_from_the_first() -> None:
    town = Town(("a",), others=("b", "c"))
    first = min(("a", "b", "c"), key=lambda peer: draw(candidate_id(ONE_OF), peer))
    town = Town(("v", "w", "x", "y", "z"), us=first, others=("a", "b", "c"))
    town.propose(ONE_OF, by="v")
    town.vote("vwx", vote_of(ONE_OF, -0.02))
    town.hear()
    town.pass_time(PACE.collect_s)
    used = town.machine.current
    town.vote("yz", vote_of(ONE_OF, 0.05))
    town.hear()
    assert town.machine.current is None
    assert used is None or town.uses() == [ONE_OF, None]


def test_liars_that_are_quick_do_not_get_beyond_the_first_step() -> None:
    town = Town(TEN)
    town.propose(ONE_OF)
    town.vote(TEN[:3], vote_of(ONE_OF, -0.05))  # 30 %
    town.hear()
    town.pass_time(50 * PACE.soak_s)
    (release,) = town.machine.releases()
    assert release.phase is Phase.ROLLING and release.share == 50
    assert "more than a third of all voters have to find it better" in release.why


def test_a_third_of_the_voters_revokes_it_for_good() -> None:
    town = Town(TEN)
    town.propose(ONE_OF)
    town.vote(TEN, vote_of(ONE_OF, -0.02))
    town.hear()
    town.pass_time(5 * PACE.soak_s)
    assert released(town)
    town.revoke(TEN[:3], ONE_OF)
    town.hear()
    assert released(town)
    town.revoke(TEN[:4], ONE_OF)
    town.hear()
    assert town.machine.current is None and town.machine.head is None
    (release,) = town.machine.releases()
    assert (
        release.phase is Phase.REVOKED
        and "4 of 10 voters revoked it, most of them because it is worse" in release.why
    )
    town.said = {key: said for key, said in town.said.items() if key[1] is not Revocations}
    town.hear()
    town.pass_time(9 * PACE.soak_s)
    assert town.machine.current is None
    (memory,) = [effect.memory for effect in town.effects if isinstance(effect, Remember)][-1:]
    town.restart(decode(Memory, encode(memory)))
    town.hear()
    town.pass_time(9 * PACE.soak_s)
    assert town.machine.current is None and town.machine.releases()[0].phase is Phase.REVOKED


def test_a_founders_person_takes_it_back_alone_but_no_other() -> None:
    town = Town(TEN, founders=(TEN[3],))
    town.propose(ONE_OF)
    town.revoke([TEN[2]], ONE_OF, PERSON)
    assert not town.count().revoked
    town.revoke([TEN[3]], ONE_OF)  # its machine, not its person
    assert not town.count().revoked
    town.revoke([TEN[3]], ONE_OF, PERSON)
    assert town.count().revoked == {ONE_OF.adapter: "the network's owner took it back: it is worse"}


def test_what_follows_on_a_revoked_one_falls_with_it() -> None:
    two = candidate_of("two", 2, ONE_OF.adapter)
    town = Town(("a", "b", "c"))
    town.propose(two, ONE_OF)
    town.vote("abc", vote_of(ONE_OF, -0.02), vote_of(two, -0.02))
    town.hear()
    town.pass_time(12 * PACE.soak_s)
    assert town.machine.current == two
    town.revoke("abc", ONE_OF)
    town.hear()
    assert town.machine.current is None
    assert "builds on an adapter that was revoked" in town.machine.releases()[0].why


def test_the_old_one_stays_loaded_until_the_roll_out_ends() -> None:
    two = candidate_of("two", 2, ONE_OF.adapter)
    town = Town(("a", "b", "c"))
    town.propose(ONE_OF)
    town.vote("abc", vote_of(ONE_OF, -0.02))
    town.hear()
    town.pass_time(5 * PACE.soak_s)
    assert town.machine.kept == {ONE_OF.adapter}
    town.propose(two, ONE_OF)
    town.vote("abc", vote_of(two, -0.02))
    town.hear()
    town.pass_time(PACE.collect_s)
    assert town.machine.kept == {ONE_OF.adapter, two.adapter}
    town.pass_time(5 * PACE.soak_s)
    assert town.machine.kept == {two.adapter} and released(town, two)
    assert [release.phase for release in town.machine.releases()] == [Phase.RELEASED, Phase.REPLACED]


def test_a_restart_loses_nothing_that_was_decided() -> None:
    town = Town(("a", "b", "c"))
    town.propose(ONE_OF)
    town.vote("bc", vote_of(ONE_OF, -0.02))
    town.hear()
    town.handle(Judged(vote_of(ONE_OF, -0.02)))
    town.hear()
    town.pass_time(5 * PACE.soak_s)
    assert released(town)
    town.restart(town.machine.memory())
    town.said.clear()
    town.hear()
    assert released(town)


# ---------------------------------------------------------------- judging


def test_a_voter_judges_what_builds_on_its_release_one_at_a_time() -> None:
    two, three = candidate_of("two"), candidate_of("three", 3, block("unknown"))
    town = Town(("a", "b", "c"))
    town.propose(ONE_OF, two, three, by="b")
    (judge,) = [effect for effect in town.hear() if isinstance(effect, Judge)]
    assert judge.seed == suite_seed(judge.id, "a") and judge.candidate in (ONE_OF, two)
    assert not town.hear()
    said = town.handle(Judged(vote_of(judge.candidate, -0.02)))
    assert Say(Ballots(votes=(vote_of(judge.candidate, -0.02),))) in said
    town.hear()
    assert sorted(town.judging(), key=str) == sorted((ONE_OF, two), key=str)
    behind = next(release for release in town.machine.releases() if release.counted.candidate == three)
    assert behind.phase is Phase.OPEN and "which has not been released here yet" in behind.why


def test_what_could_not_be_judged_is_tried_again() -> None:
    town = Town(("a", "b", "c"))
    town.propose(ONE_OF, by="b")
    town.hear()
    town.handle(NotJudged(candidate_id(ONE_OF)))
    town.hear()
    assert town.judging() == [ONE_OF]
    town.pass_time(PACE.retry_s)
    assert town.judging() == [ONE_OF, ONE_OF]


def test_who_may_not_vote_does_not_judge() -> None:
    town = Town(("b", "c", "d"), us="a", others=("a",))
    town.propose(ONE_OF)
    town.hear()
    assert not town.judging()


def test_a_proposer_that_floods_waits_for_the_others() -> None:
    flood = [candidate_of(f"flood {number}", round=100 + number) for number in range(4)]
    town = Town(("a", "b", "c"))
    town.propose(*flood, by="b")
    town.propose(ONE_OF, by="c")
    town.hear()
    town.handle(Judged(vote_of(town.judging()[-1], -0.02)))
    town.hear()
    assert ONE_OF in town.judging()[:2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": block("other")}, "it is for another model release"),
        ({"version": "v1.1.0-1"}, "its version must begin with that"),
        ({"suite": cid_of(RAW, b"mine")}, "proposed for other held-out samples"),
    ],
)
def test_skew_is_told_in_words(changes: dict[str, str], words: str) -> None:
    odd = replace(ONE_OF, **changes)
    town = Town(("a", "b", "c"))
    town.propose(odd)
    town.vote("abc", vote_of(odd, -0.5))
    town.hear()
    town.pass_time(9 * PACE.soak_s)
    (release,) = town.machine.releases()
    assert release.phase is Phase.FOREIGN and words in release.why
    assert town.machine.current is None and not town.judging()


def test_another_model_ends_its_use_and_the_same_brings_it_back() -> None:
    town = Town(("a", "b", "c"))
    town.propose(ONE_OF)
    town.vote("abc", vote_of(ONE_OF, -0.02))
    town.hear()
    town.pass_time(5 * PACE.soak_s)
    town.handle(Serving(replace(SERVED, base=block("other"), version="v2.0.0-0")))
    assert town.machine.current is None
    town.handle(Serving(replace(SERVED, suite=cid_of(RAW, b"a new lesson"))))
    assert town.machine.current == ONE_OF


def test_a_proposal_that_is_overtaken_is_taken_back() -> None:
    mine = candidate_of("mine")
    town = Town(("a", "b", "c"))
    town.handle(Proposed(mine))
    assert town.said["a", Candidates] == Candidates(proposed=(mine,))
    town.propose(ONE_OF, by="b")
    town.vote("abc", vote_of(ONE_OF, -0.02))
    town.hear()
    town.pass_time(5 * PACE.soak_s)
    town.hear()
    assert town.said["a", Candidates] == Candidates(proposed=())


# ---------------------------------------------------------------- live errors


def test_the_sequential_test_keeps_its_promises() -> None:
    assert likelihood(0, 7, 0.05) > 4.55 > likelihood(0, 6, 0.05)
    assert not is_stopped(95, 5, 0.05) and is_stopped(85, 15, 0.05)
    assert usual_rate(0, 0) == 0.05 and usual_rate(10_000, 0) == 0.01 and usual_rate(0, 10_000) == 0.4
    assert not are_stopped([]) and not are_stopped([9, 9, -1, -1]) and are_stopped([2, 2, 2, -1, 99])


def test_a_node_goes_back_from_what_fails_here_and_stays_back() -> None:
    town = Town(("a", "b", "c", "d"))
    town.propose(ONE_OF)
    town.vote("abcd", vote_of(ONE_OF, -0.02))
    town.hear()
    town.pass_time(5 * PACE.soak_s)
    for number in range(40):
        town.handle(Answered(ONE_OF.adapter, wrong=number % 2 == 0))
    assert town.machine.current is None and town.uses() == [ONE_OF, None]
    (revoked,) = town.words(Revocations).values()
    assert revoked.revoked[0].ground == LIVE_ERRORS and revoked.revoked[0].wrong > revoked.revoked[0].right / 3
    town.hear()  # one of four is no third
    assert town.machine.releases()[0].phase is Phase.LEFT
    town.restart(town.machine.memory())
    town.hear()
    assert town.machine.current is None


def test_reports_hold_a_roll_out_until_others_have_tried_it() -> None:
    order = sorted(TEN, key=lambda peer: draw(candidate_id(ONE_OF), peer))
    town = Town(TEN, us=order[-1])
    town.propose(ONE_OF)
    town.vote(TEN, vote_of(ONE_OF, -0.02))
    town.hear()
    town.pass_time(PACE.collect_s)
    bad = Tallies(base=SERVED.base, seen=(Tally(candidate=ONE_OF, right=50, wrong=50),))
    good = Tallies(base=SERVED.base, seen=(Tally(candidate=ONE_OF, right=190, wrong=10),))
    for liar in order[5:9]:  # not their turn
        town.said[liar, Tallies] = bad
    town.hear()
    assert town.machine.releases()[0].phase is Phase.ROLLING
    town.said[order[0], Tallies] = bad
    town.hear()
    assert town.machine.releases()[0].phase is Phase.HELD
    town.pass_time(PACE.soak_s)
    assert town.machine.releases()[0].share == 50
    town.said[order[1], Tallies] = good
    town.hear()
    town.pass_time(2 * PACE.soak_s)
    assert town.machine.releases()[0].share >= 250


def test_what_was_seen_is_told_now_and_then() -> None:
    town = Town(("a", "b", "c"))
    town.hear()
    for _ in range(5):
        town.handle(Answered("", wrong=False))
    town.pass_time(1)
    assert town.words(Tallies) == {"a": Tallies(base=SERVED.base, seen=(Tally(right=5),))}
    town.handle(Answered("", wrong=True))
    town.pass_time(PACE.report_s / 2)
    assert town.words(Tallies)[PeerId("a")].seen[0].wrong == 0
    town.pass_time(PACE.report_s)
    assert town.words(Tallies)[PeerId("a")].seen[0].wrong == 1


def test_a_person_goes_back_at_once() -> None:
    town = Town(("a", "b", "c", "d", "e"))
    town.propose(ONE_OF)
    town.vote("abcde", vote_of(ONE_OF, -0.02))
    town.hear()
    town.pass_time(5 * PACE.soak_s)
    town.handle(RolledBack(ONE_OF.adapter, "it insults people"))
    assert town.machine.current is None
    assert town.words(Revocations)[PeerId("a")].revoked[0].ground == PERSON


# ---------------------------------------------------------------- forks


def test_of_two_that_were_released_apart_the_one_with_more_votes_counts() -> None:
    other = candidate_of("other")
    town = Town(TEN)
    town.propose(ONE_OF)
    town.vote(TEN[:4], vote_of(ONE_OF, -0.02))
    town.hear()
    town.pass_time(5 * PACE.soak_s)
    assert released(town)
    town.propose(other, by=TEN[9])
    town.vote(TEN[4:], vote_of(other, -0.02))
    town.hear()
    town.pass_time(5 * PACE.soak_s)
    assert released(town, other)
    assert {release.phase for release in town.machine.releases()} == {Phase.RELEASED, Phase.REPLACED}


def test_a_latecomer_takes_what_most_have_released() -> None:
    town = Town(("a", "b", "c"), us="late", others=("late", "d"))
    town.propose(ONE_OF)
    town.vote("abc", vote_of(ONE_OF, -0.02))
    for peer in "abc":
        town.said[peer, Tallies] = Tallies(base=SERVED.base, seen=(Tally(candidate=ONE_OF, released=True),))
    town.hear()
    town.pass_time(PACE.collect_s)
    assert released(town)


def test_whoever_hears_the_same_decides_the_same() -> None:
    rivals = [candidate_of(f"rival {number}", 1 + number % 2) for number in range(4)]
    heads = set()
    for us in TEN:
        town = Town(TEN, us=us)
        town.propose(*rivals)
        for number, voter in enumerate(TEN):
            town.vote([voter], *(vote_of(one, -0.02) for one in rivals[: 1 + number % 4]))
        town.hear()
        town.pass_time(20 * PACE.soak_s)
        heads.add(town.machine.head)
    assert len(heads) == 1 and None not in heads


def test_a_circle_of_candidates_ends() -> None:
    x = candidate_of("x", 2, block("y"))
    y = candidate_of("y", 3, block("x"))
    town = Town(("a", "b", "c"))
    town.propose(x, y)
    town.vote("abc", vote_of(x, -0.02), vote_of(y, -0.02))
    town.hear()
    town.pass_time(9 * PACE.soak_s)
    assert town.machine.current is None


def test_a_new_node_asks_for_nothing() -> None:
    machine = Rollout(PeerId("a"), PACE)
    assert machine.current is None and machine.head is None and not machine.kept and not machine.releases()


def test_nodes_without_a_vote_do_not_hurry_it() -> None:
    """Whoever may invite can make up any number of nodes that say a roll-out is over."""
    town = Town(TEN, others=tuple(f"stranger-{number}" for number in range(100)))
    town.propose(ONE_OF)
    town.vote(TEN[:4], vote_of(ONE_OF, -0.02))
    for peer in town.others:
        town.said[peer, Tallies] = Tallies(base=SERVED.base, seen=(Tally(candidate=ONE_OF, released=True),))
    town.hear()
    town.pass_time(PACE.collect_s)
    (release,) = town.machine.releases()
    assert release.share == 50


def test_a_flood_of_proposals_does_not_hide_those_of_others() -> None:
    town = Town(TEN, others=tuple(f"stranger-{number}" for number in range(30)))
    for number in range(30):
        flood = [candidate_of(f"flood {number} {place}", 999) for place in range(4)]
        town.propose(*flood, by=f"stranger-{number}")
        town.said[f"stranger-{number}", Tallies] = Tallies(
            base=SERVED.base, seen=tuple(Tally(candidate=one, right=1) for one in flood)
        )
    town.propose(ONE_OF, by=TEN[0])
    assert candidate_id(ONE_OF) in town.count().of and len(town.count().of) == MAX_COUNTED
