"""Two machines with a link between them; every refusal in words on both sides."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId
from protocols.membership import Credentials, HelloMachine, Secret, Secrets, Trust, Untrusted
from protocols.membership import machine as hello
from protocols.membership.messages import (
    HELLO,
    HELLO_S,
    MAX_CLOCK_MS,
    MAX_SECRETS,
    SEALED_BYTES,
    Granted,
    Hello,
    Join,
    NewSecret,
    Refused,
    Roster,
    Welcome,
)
from protocols.membership.renewal import id_of, open_renewal, sign_renewal
from tests.unit.membership_actors import NOW_MS, World, key_of, peer_of_key

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
        remembers: bool = False,
    ) -> None:
        ann = asker_id or (asker.peer if asker else peer_of_key("joiner"))
        bob = answerer.peer if answerer else peer_of_key("ghost")
        self.asker = HelloMachine(
            theirs=bob,
            credentials=asker,
            trust=asker_trust or (W.trust() if asker else None),
            nonce=b"a" * 16,
            now=0,
            remembers=lambda peer, chain: remembers,
        )
        self.answerer = HelloMachine(
            theirs=ann,
            credentials=answerer,
            trust=answerer_trust or W.trust(),
            nonce=b"b" * 16,
            now=0,
            remembers=lambda peer, chain: remembers,
        )
        self.skew_ms = skew_ms
        self.facts: dict[str, list[hello.Effect]] = {"asker": [], "answerer": []}

    def run(self, first: hello.Begin | hello.BeginJoin | None = None) -> Pair:
        self.deliver("asker", self.asker.handle(first or hello.Begin(), 0, NOW_MS))
        return self

    def deliver(self, side: str, effects: tuple[hello.Effect, ...]) -> None:
        """Keep the facts of one side, hand its messages to the other."""
        self.facts[side] += [effect for effect in effects if not isinstance(effect, hello.Send)]
        for effect in effects:
            if isinstance(effect, hello.Send):
                message = HELLO.decode(HELLO.encode(effect.message))
                if side == "asker":
                    self.deliver("answerer", self.answerer.handle(message, 0, NOW_MS + self.skew_ms))
                else:
                    self.deliver("asker", self.asker.handle(message, 0, NOW_MS))

    def turned(self, side: str) -> hello.Rejected:
        (fact,) = (fact for fact in self.facts[side] if isinstance(fact, hello.Rejected))
        return fact


def refusal(pair: Pair, by: str) -> hello.Rejected:
    """The refusal, known to both sides with the same words."""
    other = "asker" if by == "answerer" else "answerer"
    assert pair.asker.state is pair.answerer.state is hello.State.REFUSED
    assert pair.turned(by).by_us and not pair.turned(other).by_us
    assert pair.turned(by).reason == pair.turned(other).reason
    return pair.turned(other)


def test_two_members_accept_each_other_and_measure_their_clocks() -> None:
    pair = Pair(W.credentials("ann"), W.credentials("ann", "bob"), skew_ms=4000).run()
    assert pair.asker.state is pair.answerer.state is hello.State.ADMITTED
    seen = {side: [type(fact) for fact in facts] for side, facts in pair.facts.items()}
    assert all(kinds == [hello.Trusted, hello.MutuallyAdmitted] for kinds in seen.values())
    ours, theirs = pair.facts["asker"][0], pair.facts["answerer"][0]
    assert isinstance(ours, hello.Trusted) and isinstance(theirs, hello.Trusted)
    assert (ours.member.peer, ours.member.name, ours.clock_offset_ms) == (peer_of_key("bob"), "bob", 4000)
    assert (theirs.member.standing.distance, theirs.clock_offset_ms) == (1, -4000)
    assert pair.asker.deadline is pair.answerer.deadline is None


def test_the_asker_serves_before_it_says_so() -> None:
    """Otherwise the answerer's first streams would be refused."""
    pair = Pair(ANN, BOB)
    (asked,) = pair.asker.handle(hello.Begin(), 0, NOW_MS)
    assert isinstance(asked, hello.Send)
    (answer,) = pair.answerer.handle(asked.message, 0, NOW_MS)
    assert isinstance(answer, hello.Send)
    effects = pair.asker.handle(answer.message, 0, NOW_MS)
    assert [type(effect) for effect in effects] == [hello.Trusted, hello.Send]


def out_of(asker: Credentials | None, answerer: Credentials, **more: Any) -> Pair:
    return Pair(asker, answerer, **more).run()


def withdrawn() -> Trust:
    trust = W.trust()
    trust.withdraw(W.withdrawal("ann", by="founder", issued_ms=NOW_MS), NOW_MS)
    return trust


FIRST = Secret(W.secret)
NEW = sign_renewal(key_of("founder"), W.trust().id, b"n" * 32, NOW_MS, ())
OTHER = sign_renewal(key_of("founder"), W.trust().id, b"o" * 32, NOW_MS - 1000, ())


def knows(who: Credentials, *secrets: Secret) -> Credentials:
    return replace(who, secrets=Secrets(secrets))


class _Liar(Secrets):
    """Knows its first secret, and names others after it."""

    def __init__(self, known: Secret, named: Secret) -> None:
        super().__init__([known])
        self._named = named

    @property
    def ids(self) -> tuple[bytes, ...]:
        return (*super().ids, self._named.id)

    def first_of(self, ids: Sequence[bytes]) -> Secret | None:
        return super().first_of(ids) or Secret(bytes(32))

    def first_in(self, ids: Collection[bytes]) -> Secret | None:
        return super().first_in(ids) or Secret(bytes(32))


def claims(who: Credentials, known: Secret, named: Secret) -> Credentials:
    return replace(who, secrets=_Liar(known, named))


JOIN = Join(network=W.trust().id, invite=bytes(16), secret=bytes(16), name="new", software="0.1.0", wall_ms=NOW_MS)
ANN, BOB, MALLORY = W.credentials("ann"), W.credentials("bob"), World(founder="mallory")
STRANGER = replace(W.credentials("eve"), chain=())
EXPIRED = replace(ANN, chain=W.chain("ann", expires_ms=NOW_MS - 1))
# Who meets whom, which side refuses, with which code and words.
REFUSED: dict[str, tuple[Callable[[], Pair], str, str, str]] = {
    "a stranger": (lambda: out_of(STRANGER, BOB), "answerer", "stranger", "no certificate of this network.*ticket"),
    "a stranger that answers": (lambda: out_of(BOB, STRANGER), "asker", "stranger", ""),
    "a member of another network": (
        lambda: out_of(MALLORY.credentials("eve"), BOB, asker_trust=MALLORY.trust()), "answerer", "other-network", ""
    ),
    "somebody else's certificate": (
        lambda: out_of(ANN, BOB, asker_id=peer_of_key("eve")), "answerer", "stranger", "another node"
    ),
    "an expired certificate": (lambda: out_of(EXPIRED, BOB), "answerer", "expired", "expired on 2023-11-14"),
    "a withdrawn member": (
        lambda: out_of(ANN, BOB, answerer_trust=withdrawn()), "answerer", "forbidden", "withdrawn"
    ),
    # The answerer looks first whether there is a secret that both know.
    "another secret": (lambda: out_of(knows(ANN, OTHER), BOB), "answerer", "stranger", "secret"),
    "an answerer with another": (lambda: out_of(ANN, knows(BOB, OTHER)), "answerer", "stranger", "secret"),
    "a secret that it only says it knows": (
        lambda: out_of(claims(ANN, OTHER, FIRST), BOB), "asker", "stranger", "does not know the secret"
    ),
    "an answerer that only says so": (
        lambda: out_of(ANN, claims(BOB, OTHER, FIRST)), "asker", "stranger", "does not know the secret"
    ),
    "a stranger with a secret that was replaced": (
        lambda: out_of(ANN, knows(BOB, NEW, FIRST)), "answerer", "stranger", "was replaced.*new ticket"
    ),
    "an answerer with a secret that was replaced": (
        lambda: out_of(knows(ANN, NEW, FIRST), BOB), "asker", "stranger", "was replaced.*new ticket"
    ),
    "one that names the present secret, and proves the one before": (
        lambda: out_of(knows(ANN, NEW, FIRST), claims(BOB, FIRST, NEW)), "asker", "stranger", "was replaced"
    ),
    "a fast clock": (lambda: out_of(ANN, BOB, skew_ms=-MAX_CLOCK_MS - 1), "answerer", "clock", "set the clocks"),
    "a slow clock": (lambda: out_of(ANN, BOB, skew_ms=MAX_CLOCK_MS + 1), "answerer", "clock", "set the clocks"),
    "a ticket of another network": (
        lambda: Pair(None, BOB).run(hello.BeginJoin(replace(JOIN, network="x" * 24))), "answerer", "other-network", ""
    ),
    "a joiner with a wrong clock": (
        lambda: Pair(None, BOB).run(hello.BeginJoin(replace(JOIN, wall_ms=0))), "answerer", "clock", ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("who", REFUSED)
def test_who_is_refused_is_told_why_on_both_sides(who: str) -> None:
    meet, by, code, words = REFUSED[who]
    no = refusal(meet(), by)
    assert no.code == code
    assert re.search(words, no.reason)


def test_an_asker_without_proof_or_with_a_reflected_one() -> None:
    for forged in (None, "reflect"):
        pair = Pair(ANN, BOB)
        (asked,) = pair.asker.handle(hello.Begin(), 0, NOW_MS)
        assert isinstance(asked, hello.Send)
        (answer,) = pair.answerer.handle(asked.message, 0, NOW_MS)
        assert isinstance(answer, hello.Send) and isinstance(answer.message, Hello)
        proof = None if forged is None else answer.message.proof
        effects = pair.answerer.handle(Welcome(wall_ms=NOW_MS, proof=proof), 0, NOW_MS)
        assert [type(effect) for effect in effects] == [hello.Send, hello.Rejected]
        assert pair.answerer.state is hello.State.REFUSED


def test_silence_is_refused_when_the_deadline_has_passed() -> None:
    pair = Pair(ANN, BOB)
    assert pair.answerer.deadline == HELLO_S
    effects = pair.answerer.handle(hello.Expired(), HELLO_S, NOW_MS)
    assert isinstance(effects[1], hello.Rejected) and effects[1].code == "stranger"
    assert "within 5 s" in effects[1].reason


GRANTED = Granted(
    network=W.network_record, chain=W.chain("bob", "joiner"), sealed=bytes(SEALED_BYTES), wall_ms=NOW_MS
)


def test_a_ticket_is_redeemed() -> None:
    pair = Pair(None, BOB).run(hello.BeginJoin(JOIN))
    assert pair.facts["answerer"] == [hello.Redeem(JOIN)]
    pair.deliver("answerer", pair.answerer.handle(hello.Grant(GRANTED), 0, NOW_MS))
    assert pair.facts["asker"] == [hello.Joined(GRANTED)]
    assert pair.asker.state is pair.answerer.state is hello.State.GRANTED


def test_a_used_ticket_is_refused_in_words_on_both_sides() -> None:
    pair = Pair(None, BOB).run(hello.BeginJoin(JOIN))
    pair.deliver("answerer", pair.answerer.handle(hello.Deny("invite-used", "the ticket was used"), 0, NOW_MS))
    assert refusal(pair, by="answerer").code == "invite-used"


def test_an_unknown_code_and_escape_sequences_of_a_peer_are_made_harmless() -> None:
    pair = Pair(ANN, BOB)
    pair.asker.handle(hello.Begin(), 0, NOW_MS)
    (turned,) = pair.asker.handle(Refused(code="because", reason="\x1b[2Jno\n"), 0, NOW_MS)
    assert turned == hello.Rejected(code="stranger", reason="·[2Jno·", by_us=False)


def test_what_a_state_does_not_allow_changes_nothing() -> None:
    pair = Pair(ANN, BOB)
    with pytest.raises(RemoteProtocolError):
        pair.answerer.handle(Welcome(wall_ms=NOW_MS), 0, NOW_MS)
    with pytest.raises(RemoteProtocolError):
        pair.answerer.handle(hello.Ended(), 0, NOW_MS)
    with pytest.raises(LocalProtocolError):
        pair.answerer.handle(hello.Deny("forbidden", "no"), 0, NOW_MS)
    assert pair.answerer.state is hello.State.IDLE
    assert pair.run().answerer.state is hello.State.ADMITTED


def test_rosters_are_bounded() -> None:
    pair = Pair(ANN, BOB).run()
    for _ in range(hello.MAX_ROSTERS):
        assert pair.asker.handle(Roster(), 0, NOW_MS) == (hello.RosterReceived(Roster()),)
    with pytest.raises(RemoteProtocolError, match="rosters"):
        pair.asker.handle(Roster(), 0, NOW_MS)


def test_the_specification_shows_the_transitions() -> None:
    text = (Path(hello.__file__).parent / "SPEC.md").read_text()
    rows = re.findall(r"^\| ([A-Z]+) \| (\w+) \| ([A-Z]+) \|$", text, re.MULTILINE)
    told = {(state, event): after for state, event, after in rows}
    assert told == {(state.name, event.__name__): after.name for (state, event), after in hello.TRANSITIONS.items()}


ONLY, BOTH, NEWER = (FIRST,), (NEW, FIRST), (NEW,)


@pytest.mark.parametrize(
    ("asker", "answerer", "behind"),
    [
        (BOTH, BOTH, (False, False)),
        (NEWER, BOTH, (False, False)),
        (BOTH, ONLY, (True, False)),
        (ONLY, BOTH, (False, True)),
        ((OTHER, FIRST), BOTH, (True, True)),
    ],
    ids=["same", "a new member", "the answerer was away", "the asker was away", "renewed on both sides"],
)
def test_members_that_remember_each_other_agree_on_a_secret_and_see_who_lacks_the_present_one(
    asker: tuple[Secret, ...], answerer: tuple[Secret, ...], behind: tuple[bool, bool]
) -> None:
    pair = Pair(knows(ANN, *asker), knows(BOB, *answerer), remembers=True).run()
    assert pair.asker.state is pair.answerer.state is hello.State.ADMITTED
    for side, lacks in zip(("asker", "answerer"), behind, strict=True):
        assert [fact for fact in pair.facts[side] if isinstance(fact, hello.MutuallyAdmitted)] == [
            hello.MutuallyAdmitted(lacks)
        ]
    told = NewSecret(renewal=NEW.renewal, secret=NEW.secret)
    assert pair.asker.handle(told, 0, NOW_MS) == (hello.SecretReceived(told),)
    with pytest.raises(RemoteProtocolError, match="a second secret"):
        pair.asker.handle(told, 0, NOW_MS)


CHAIN = W.chain("ann")
# What came, and as a renewal of which secret; and what is wrong.
FORGED: dict[str, tuple[Secret, bytes, str, str]] = {
    "another secret": (NEW, b"x" * 32, "stranger", "another secret than it speaks of"),
    "noise": (replace(NEW, renewal=b"noise"), NEW.secret, "stranger", "does not hold"),
    "by an inviter who is no founder's device": (
        sign_renewal(key_of("bob"), W.trust().id, NEW.secret, NOW_MS, W.chain("ann", "bob")), NEW.secret,
        "forbidden", "is no founder",
    ),
    "by a founder's device that may not invite": (
        sign_renewal(key_of("ann"), W.trust().id, NEW.secret, NOW_MS, W.chain("ann", roles=("serve",))), NEW.secret,
        "forbidden", "is no founder",
    ),
    "by nobody": (
        sign_renewal(key_of("eve"), W.trust().id, NEW.secret, NOW_MS, ()), NEW.secret, "stranger", "no founder"
    ),
    "with somebody else's chain": (
        sign_renewal(key_of("eve"), W.trust().id, NEW.secret, NOW_MS, CHAIN), NEW.secret, "forbidden", ""
    ),
    "of another network": (
        sign_renewal(key_of("founder"), "other", NEW.secret, NOW_MS, ()), NEW.secret, "other-network", ""
    ),
    "of the future": (
        sign_renewal(key_of("founder"), W.trust().id, NEW.secret, NOW_MS + MAX_CLOCK_MS + 1, ()), NEW.secret,
        "clock", "in the future",
    ),
    "far too long": (replace(NEW, renewal=bytes(5000)), NEW.secret, "stranger", "4096 is the limit"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_a_renewal_is_a_founders_word(case: str) -> None:
    said, secret, code, words = FORGED[case]
    with pytest.raises(Untrusted, match=words) as caught:
        open_renewal(said.renewal, secret, W.trust(), NOW_MS)
    assert caught.value.code == code


def test_a_founders_device_renews_until_it_is_put_out() -> None:
    trust = W.trust()
    word = sign_renewal(key_of("ann"), trust.id, NEW.secret, NOW_MS, CHAIN)
    assert open_renewal(word.renewal, NEW.secret, trust, NOW_MS) == word
    trust.withdraw(W.withdrawal("ann", by="founder", issued_ms=NOW_MS), NOW_MS)
    with pytest.raises(Untrusted, match="was withdrawn"):
        open_renewal(word.renewal, NEW.secret, trust, NOW_MS)


def test_all_agree_which_secret_is_the_present_one() -> None:
    twins = [sign_renewal(key_of("founder"), W.trust().id, bytes([n]) * 32, NOW_MS, ()) for n in range(3)]
    known = [FIRST, OTHER, *twins]
    orders = [Secrets(known), Secrets(reversed(known)), Secrets([FIRST]).plus(twins[1]).plus(OTHER).plus(twins[2])]
    assert {order.present for order in orders[:2]} == {max(twins, key=lambda one: one.rank)}
    assert orders[0].ids == orders[1].ids
    many = Secrets(sign_renewal(key_of("founder"), W.trust().id, bytes([n]) * 32, n, ()) for n in range(40))
    assert len(many.ids) == MAX_SECRETS and many.present.issued_ms == 39
    assert id_of(bytes([39]) * 32) == many.ids[0]


def test_who_was_put_out_is_shown_the_signed_word() -> None:
    for pair in (
        Pair(ANN, BOB, answerer_trust=withdrawn()).run(),  # it asks
        Pair(BOB, ANN, asker_trust=withdrawn()).run(),  # it answers
    ):
        (learned,) = (
            fact for facts in pair.facts.values() for fact in facts if isinstance(fact, hello.RosterReceived)
        )
        trust = W.trust()
        assert [trust.withdraw(data, NOW_MS) for data in learned.roster.withdrawals] == [ANN.peer]
        with pytest.raises(Untrusted, match="was withdrawn"):
            trust.check(ANN.chain, NOW_MS)


def test_a_stranger_with_the_chain_of_who_was_put_out_learns_nothing() -> None:
    pair = Pair(ANN, BOB, answerer_trust=withdrawn(), asker_id=peer_of_key("eve")).run()
    assert pair.turned("answerer").code == "forbidden"
    assert not any(isinstance(fact, hello.RosterReceived) for fact in pair.facts["asker"])
