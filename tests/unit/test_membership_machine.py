"""Two machines with a link between them; every refusal in words on both sides."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import protocols.membership
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId
from protocols.membership import Credentials, HelloMachine, Trust
from protocols.membership.machine import (
    MAX_ROSTERS,
    TRANSITIONS,
    Begin,
    BeginJoin,
    Deny,
    Effect,
    Ended,
    Expired,
    Grant,
    Joined,
    MutuallyAdmitted,
    Redeem,
    Rejected,
    RosterReceived,
    Send,
    State,
    Trusted,
)
from protocols.membership.messages import (
    HELLO,
    HELLO_S,
    MAX_CLOCK_MS,
    SEALED_BYTES,
    Granted,
    Hello,
    Join,
    Refused,
    Roster,
    Welcome,
)
from tests.unit.membership_actors import NOW_MS, World, peer_of_key

W = World()


class Pair:
    """An asker and an answerer; messages cross as bytes, each side has its own wall clock."""

    def __init__(
        self,
        asker: Credentials | None,
        answerer: Credentials | None,
        *,
        asker_trust: Trust | None = None,
        answerer_trust: Trust | None = None,
        asker_id: PeerId | None = None,
        skew_ms: int = 0,
    ) -> None:
        ann = asker_id or (asker.peer if asker else peer_of_key("joiner"))
        bob = answerer.peer if answerer else peer_of_key("ghost")
        self.asker = HelloMachine(
            theirs=bob, credentials=asker, trust=asker_trust or (W.trust() if asker else None), nonce=b"a" * 16, now=0
        )
        self.answerer = HelloMachine(
            theirs=ann, credentials=answerer, trust=answerer_trust or W.trust(), nonce=b"b" * 16, now=0
        )
        self.skew_ms = skew_ms
        self.facts: dict[str, list[Effect]] = {"asker": [], "answerer": []}

    def run(self, first: Begin | BeginJoin | None = None) -> Pair:
        self.deliver("asker", self.asker.handle(first or Begin(), 0, NOW_MS))
        return self

    def deliver(self, side: str, effects: tuple[Effect, ...]) -> None:
        """Keep the facts of one side, hand its messages to the other."""
        self.facts[side] += [effect for effect in effects if not isinstance(effect, Send)]
        for effect in effects:
            if isinstance(effect, Send):
                message = HELLO.decode(HELLO.encode(effect.message))
                if side == "asker":
                    self.deliver("answerer", self.answerer.handle(message, 0, NOW_MS + self.skew_ms))
                else:
                    self.deliver("asker", self.asker.handle(message, 0, NOW_MS))

    def turned(self, side: str) -> Rejected:
        (fact,) = (fact for fact in self.facts[side] if isinstance(fact, Rejected))
        return fact


def refusal(pair: Pair, by: str) -> Rejected:
    """The refusal, known to both sides with the same words."""
    other = "asker" if by == "answerer" else "answerer"
    assert pair.asker.state is pair.answerer.state is State.REFUSED
    assert pair.turned(by).by_us and not pair.turned(other).by_us
    assert pair.turned(by).reason == pair.turned(other).reason
    return pair.turned(other)


def test_two_members_accept_each_other_and_measure_their_clocks() -> None:
    pair = Pair(W.credentials("ann"), W.credentials("ann", "bob"), skew_ms=4000).run()
    assert pair.asker.state is pair.answerer.state is State.ADMITTED
    seen = {side: [type(fact) for fact in facts] for side, facts in pair.facts.items()}
    assert seen == {"asker": [Trusted, MutuallyAdmitted], "answerer": [Trusted, MutuallyAdmitted]}
    ours, theirs = pair.facts["asker"][0], pair.facts["answerer"][0]
    assert isinstance(ours, Trusted) and isinstance(theirs, Trusted)
    assert (ours.member.peer, ours.member.name, ours.clock_offset_ms) == (peer_of_key("bob"), "bob", 4000)
    assert (theirs.member.standing.distance, theirs.clock_offset_ms) == (1, -4000)
    assert pair.asker.deadline is pair.answerer.deadline is None


def test_the_asker_serves_before_it_says_so() -> None:
    """Otherwise the answerer's first streams would be refused."""
    pair = Pair(W.credentials("ann"), W.credentials("bob"))
    (hello,) = pair.asker.handle(Begin(), 0, NOW_MS)
    assert isinstance(hello, Send)
    (answer,) = pair.answerer.handle(hello.message, 0, NOW_MS)
    assert isinstance(answer, Send)
    effects = pair.asker.handle(answer.message, 0, NOW_MS)
    assert [type(effect) for effect in effects] == [Trusted, Send]


def test_a_stranger_is_refused_in_words_on_both_sides() -> None:
    no = refusal(Pair(replace(W.credentials("eve"), chain=()), W.credentials("bob")).run(), by="answerer")
    assert no.code == "stranger"
    assert "no certificate of this network" in no.reason and "ticket" in no.reason


def test_a_stranger_that_answers_is_refused_too() -> None:
    no = refusal(Pair(W.credentials("bob"), replace(W.credentials("eve"), chain=())).run(), by="asker")
    assert no.code == "stranger"


def test_a_member_of_another_network() -> None:
    other = World(founder="mallory")
    no = refusal(Pair(other.credentials("eve"), W.credentials("bob"), asker_trust=other.trust()).run(), by="answerer")
    assert no.code == "other-network"


def test_the_certificate_of_somebody_else() -> None:
    pair = Pair(W.credentials("ann"), W.credentials("bob"), asker_id=peer_of_key("eve"))
    no = refusal(pair.run(), by="answerer")
    assert no.code == "stranger"
    assert "another node" in no.reason


def test_an_expired_certificate() -> None:
    old = replace(W.credentials("ann"), chain=W.chain("ann", expires_ms=NOW_MS - 1))
    no = refusal(Pair(old, W.credentials("bob")).run(), by="answerer")
    assert (no.code, "expired on 2023-11-14" in no.reason) == ("expired", True)


def test_a_withdrawn_member() -> None:
    trust = W.trust()
    trust.withdraw(W.withdrawal("ann", by="founder", issued_ms=NOW_MS), NOW_MS)
    no = refusal(Pair(W.credentials("ann"), W.credentials("bob"), answerer_trust=trust).run(), by="answerer")
    assert (no.code, "withdrawn" in no.reason) == ("forbidden", True)


@pytest.mark.parametrize("asker_knows", [True, False])
def test_who_does_not_know_the_network_secret(asker_knows: bool) -> None:
    ann = W.credentials("ann", secret=None if asker_knows else bytes(32))
    bob = W.credentials("bob", secret=bytes(32) if asker_knows else None)
    no = refusal(Pair(ann, bob).run(), by="asker")  # the answerer proves first, the asker finds the difference
    assert (no.code, "secret" in no.reason) == ("stranger", True)


def test_an_asker_without_proof_or_with_a_reflected_one() -> None:
    for forged in (None, "reflect"):
        pair = Pair(W.credentials("ann"), W.credentials("bob"))
        (hello,) = pair.asker.handle(Begin(), 0, NOW_MS)
        assert isinstance(hello, Send)
        (answer,) = pair.answerer.handle(hello.message, 0, NOW_MS)
        assert isinstance(answer, Send) and isinstance(answer.message, Hello)
        proof = None if forged is None else answer.message.proof
        effects = pair.answerer.handle(Welcome(wall_ms=NOW_MS, proof=proof), 0, NOW_MS)
        assert [type(effect) for effect in effects] == [Send, Rejected]
        assert pair.answerer.state is State.REFUSED


@pytest.mark.parametrize("skew_ms", [MAX_CLOCK_MS + 1, -MAX_CLOCK_MS - 1])
def test_clocks_that_are_too_far_apart(skew_ms: int) -> None:
    no = refusal(Pair(W.credentials("ann"), W.credentials("bob"), skew_ms=skew_ms).run(), by="answerer")
    assert no.code == "clock"
    assert "set the clocks" in no.reason


def test_silence_is_refused_when_the_deadline_has_passed() -> None:
    pair = Pair(W.credentials("ann"), W.credentials("bob"))
    assert pair.answerer.deadline == HELLO_S
    effects = pair.answerer.handle(Expired(), HELLO_S, NOW_MS)
    assert isinstance(effects[1], Rejected) and effects[1].code == "stranger"
    assert "within 5 s" in effects[1].reason


JOIN = Join(network=W.trust().id, invite=bytes(16), secret=bytes(16), name="new", software="0.1.0", wall_ms=NOW_MS)
GRANTED = Granted(
    network=W.network_record, chain=W.chain("bob", "joiner"), sealed=bytes(SEALED_BYTES), wall_ms=NOW_MS
)


def test_a_ticket_is_redeemed() -> None:
    pair = Pair(None, W.credentials("bob")).run(BeginJoin(JOIN))
    assert pair.facts["answerer"] == [Redeem(JOIN)]
    pair.deliver("answerer", pair.answerer.handle(Grant(GRANTED), 0, NOW_MS))
    assert pair.facts["asker"] == [Joined(GRANTED)]
    assert pair.asker.state is pair.answerer.state is State.GRANTED


def test_a_used_ticket_is_refused_in_words_on_both_sides() -> None:
    pair = Pair(None, W.credentials("bob")).run(BeginJoin(JOIN))
    pair.deliver("answerer", pair.answerer.handle(Deny("invite-used", "the ticket was used"), 0, NOW_MS))
    assert refusal(pair, by="answerer").code == "invite-used"


def test_a_ticket_of_another_network() -> None:
    pair = Pair(None, W.credentials("bob")).run(BeginJoin(replace(JOIN, network="x" * 24)))
    assert refusal(pair, by="answerer").code == "other-network"


def test_a_joiner_with_a_wrong_clock() -> None:
    pair = Pair(None, W.credentials("bob")).run(BeginJoin(replace(JOIN, wall_ms=0)))
    assert refusal(pair, by="answerer").code == "clock"


def test_an_unknown_code_and_escape_sequences_of_a_peer_are_made_harmless() -> None:
    pair = Pair(W.credentials("ann"), W.credentials("bob"))
    pair.asker.handle(Begin(), 0, NOW_MS)
    (turned,) = pair.asker.handle(Refused(code="because", reason="\x1b[2Jno\n"), 0, NOW_MS)
    assert turned == Rejected(code="stranger", reason="·[2Jno·", by_us=False)


def test_what_a_state_does_not_allow_changes_nothing() -> None:
    pair = Pair(W.credentials("ann"), W.credentials("bob"))
    with pytest.raises(RemoteProtocolError):
        pair.answerer.handle(Welcome(wall_ms=NOW_MS), 0, NOW_MS)
    with pytest.raises(RemoteProtocolError):
        pair.answerer.handle(Ended(), 0, NOW_MS)
    with pytest.raises(LocalProtocolError):
        pair.answerer.handle(Deny("forbidden", "no"), 0, NOW_MS)
    assert pair.answerer.state is State.IDLE
    assert pair.run().answerer.state is State.ADMITTED


def test_rosters_are_bounded() -> None:
    pair = Pair(W.credentials("ann"), W.credentials("bob")).run()
    for _ in range(MAX_ROSTERS):
        assert pair.asker.handle(Roster(), 0, NOW_MS) == (RosterReceived(Roster()),)
    with pytest.raises(RemoteProtocolError, match="rosters"):
        pair.asker.handle(Roster(), 0, NOW_MS)


def test_the_specification_shows_the_transitions() -> None:
    text = (Path(protocols.membership.__file__).parent / "SPEC.md").read_text()
    rows = re.findall(r"^\| ([A-Z]+) \| (\w+) \| ([A-Z]+) \|$", text, re.MULTILINE)
    told = {(state, event): after for state, event, after in rows}
    assert told == {(state.name, event.__name__): after.name for (state, event), after in TRANSITIONS.items()}
