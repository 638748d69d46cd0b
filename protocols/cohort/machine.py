"""One member in one cohort: keys, shares, a masked vector, and what unmasks the sum of all. See SPEC.md.

Rule 1: every state and every transition is in TRANSITIONS, nowhere else.
Rule 2: no clock, no I/O, no randomness, no vectors. Time comes in as `now` (monotonic seconds), randomness as
`entropy`, a wish to be woken goes out as `deadline`.

Nobody leads. Where members may have heard different things, they take turns in the order of the cohort: whoever's
turn it is says what it goes by, and those after it follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from protocols.cohort.cohorts import Cohort, places
from protocols.cohort.events import (
    Begin,
    Blame,
    Effect,
    Event,
    Expired,
    Fail,
    Fetch,
    Fetched,
    Heard,
    Mask,
    Say,
    Stored,
    Unmask,
)
from protocols.cohort.hearing import KEY, SECRET, SEED, Hearing, Survivors, true_pair
from protocols.cohort.keys import Pair, Secrets, commitment, open_pair, pair_seed, public, seal_pair, shares_of
from protocols.cohort.masking import VALUE_BYTES, Pads
from protocols.cohort.messages import Given, Keys, Masked, Reveal, Shares, Word
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import PeerId


class State(Enum):
    RESTING = "resting"
    KEYED = "keyed"  # waits for the keys of the others
    SHARED = "shared"  # waits for their shares
    MASKING = "masking"  # the node masks our adapter
    MASKED = "masked"  # waits for the others' masked vectors
    WAITING = "waiting"  # has said all; waits until enough have revealed
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The same on all nodes of a lineage."""

    parameters: int  # of a vector
    wait_s: float = 300.0  # for the keys of late members: until all have trained
    step_s: float = 30.0  # for each further step
    turn_s: float = 3.0  # after it, for each member whose turn comes before ours


_ENDS: Final = (State.DONE, State.FAILED)
_FROM_SHARED: Final = (State.SHARED, State.MASKING, State.WAITING, *_ENDS)
_FROM_MASKED: Final = (State.MASKED, State.WAITING, *_ENDS)
TRANSITIONS: Final[Mapping[tuple[State, type], tuple[State, ...]]] = {
    (State.RESTING, Begin): (State.KEYED,),
    (State.KEYED, Heard): (State.KEYED, *_FROM_SHARED),
    (State.KEYED, Fetched): (State.KEYED, *_ENDS),
    (State.KEYED, Expired): (State.KEYED, *_FROM_SHARED),
    (State.SHARED, Heard): _FROM_SHARED,
    (State.SHARED, Fetched): (State.SHARED, *_ENDS),
    (State.SHARED, Expired): _FROM_SHARED,
    (State.MASKING, Heard): (State.MASKING,),
    (State.MASKING, Fetched): (State.MASKING,),
    (State.MASKING, Stored): _FROM_MASKED,
    (State.MASKED, Heard): _FROM_MASKED,
    (State.MASKED, Fetched): _FROM_MASKED,
    (State.MASKED, Expired): _FROM_MASKED,
    (State.WAITING, Heard): (State.WAITING, *_ENDS),
    (State.WAITING, Fetched): (State.WAITING, *_ENDS),
    (State.WAITING, Expired): (State.FAILED,),
    **{(state, event): (state,) for state in _ENDS for event in (Heard, Fetched)},
}


class CohortMachine:
    """One member of one cohort."""

    def __init__(self, us: PeerId, cohort: Cohort, rules: Rules, entropy: bytes) -> None:
        """
        Args:
          entropy: 32 random bytes, used for nothing else.

        Raises LocalProtocolError: we are no member.
        """
        if us not in cohort.members:
            raise LocalProtocolError(f"{us} is no member of the cohort")
        self.state = State.RESTING
        self.deadline: float | None = None
        self.included = False  # whether our own adapter is in the mean, once that is ordered
        self._us = cohort.members.index(us)
        self._cohort = cohort
        self._name = cohort.name
        self._rules = rules
        self._entropy = entropy
        self._secrets = Secrets.of(entropy, self._name)
        self._hearing = Hearing(cohort)
        self._word = Word(
            peer=us,
            lineage=cohort.lineage,
            round=cohort.round,
            members=cohort.members,
            keys=Keys(seal=public(self._secrets.seal), mask=public(self._secrets.mask)),
        )
        self._pairs: dict[int, Pair] = {}  # shares that we hold, by owner
        self._asked: set[int] = set()
        self._fetched: set[int] = set()
        self._elsewhere: set[int] = set()  # members that count on another cohort
        self._awaited = 0  # whose keys are waited for until the deadline
        self._among = 0  # whose pads are in our masked vector
        self._late = False  # this step has taken too long
        self._our_turn = False  # nobody before us has said what to go by

    def expects(self, event: Event) -> bool:
        """Whether this state allows the event."""
        return (self.state, type(event)) in TRANSITIONS

    def handle(self, event: Event, now: float) -> tuple[Effect, ...]:
        """Take one event, return what to do, in order.

        Raises:
          LocalProtocolError: this state does not allow the event; nothing has changed.
        """
        if not self.expects(event):
            raise LocalProtocolError(f"a cohort does not expect {type(event).__name__} while {self.state.value}")
        following = TRANSITIONS[self.state, type(event)]
        effects: tuple[Effect, ...] = ()
        match event:
            case Begin(behind):
                self._awaited = sum(1 << i for i, peer in enumerate(self._cohort.members) if peer not in behind)
                self._enter(State.KEYED, now + self._rules.wait_s)
                effects = self._say(self._word)
            case Heard(word):
                effects = self._hear(word)
            case Stored(cid, size):
                masked = Masked(among=self._among, cid=cid, size=size)
                effects = self._say(replace(self._word, masked=masked))
                self._fetched.add(self._us)
                self._enter(State.MASKED, now + self._rules.step_s)
            case Fetched(peer):
                self._fetched.add(self._cohort.members.index(peer))
            case Expired():
                effects = self._expired(now)
        effects += self._advance(now)
        assert self.state in following, f"{type(event).__name__} led to {self.state}"
        return effects

    # ------------------------------------------------------------ what others say

    def _hear(self, word: Word) -> tuple[Effect, ...]:
        cohort = self._cohort
        if (word.lineage, word.round) != (cohort.lineage, cohort.round) or word.peer not in cohort.members:
            return ()
        peer = PeerId(word.peer)
        number = cohort.members.index(peer)
        if number == self._us:
            return ()
        if word.members != cohort.members:
            self._elsewhere.add(number)
        said = self._hearing.add(word)
        if said is not None:
            return (Blame(peer, f"it signed {said} for one round"),)
        masked = self._hearing.masked(number)
        if masked is None or number in self._asked or self.state in _ENDS:
            return ()
        self._asked.add(number)
        most = VALUE_BYTES * self._rules.parameters
        if masked.size != most:
            self._hearing.caught.add(number)
            return (Blame(peer, f"its masked vector has {masked.size} bytes; that of this lineage has {most}"),)
        return (Fetch(peer, masked.name, masked.size),)

    def _open_boxes(self) -> tuple[Effect, ...]:
        """The shares that others gave us. Whoever gave others than it says in public is left out."""
        effects = []
        for owner in places(self._hearing.having("shares")):
            given = self._hearing.given(owner, self._us)
            if owner in self._pairs or given is None:
                continue
            theirs = self._hearing.words[owner].keys.seal
            try:
                pair = open_pair(given.box, self._secrets.seal, theirs, self._name, owner, self._us)
                true = true_pair(given, pair, self._name, owner, self._us)
            except RemoteProtocolError:
                true = False
            if true:
                self._pairs[owner] = pair
            else:
                self._hearing.caught.add(owner)
                effects.append(Blame(self._cohort.members[owner], "the shares that it sealed are not what it says"))
        return tuple(effects)

    # ------------------------------------------------------------ one step after the other

    def _advance(self, now: float) -> tuple[Effect, ...]:
        """Whatever can be done with what has been heard."""
        if self.state in (State.MASKING, *_ENDS):
            return ()
        members = self._cohort.members
        effects: tuple[Effect, ...] = self._open_boxes() if self.state is not State.KEYED else ()
        effects += tuple(
            Blame(members[number], "it revealed a share that it was not given") for number in self._hearing.liars()
        )
        for chosen, signers in self._hearing.signed().items():
            if len(signers) >= self._cohort.threshold and self._fetched.issuperset(places(chosen.members)):
                return effects + self._finish(chosen, signers)
        if self.state is State.KEYED:
            keyed = self._hearing.having("keys")
            if keyed == self._cohort.everybody:
                effects += self._share(now) + self._advance(now)
            elif self._awaited & ~keyed == 0 and not self._late:
                self._late, self.deadline = True, min(self.deadline or now, now + self._rules.step_s)
            if self.state is State.KEYED and not self._our_turn and self._hearing.gave(self._us):
                self._our_turn, self.deadline = True, min(self.deadline or now, now + self._rules.turn_s)
        elif self.state is State.SHARED and (among := self._go_among()) is not None:
            effects += self._mask(among, now)
        elif self.state is State.MASKED and (survivors := self._go_by()) is not None:
            effects += self._reveal(survivors, now)
        return effects

    def _expired(self, now: float) -> tuple[Effect, ...]:
        """A step has taken too long."""
        if self.state is State.KEYED:
            return self._share(now)
        if self.state is State.WAITING:
            return self._fail("too few members signed one set of survivors")
        if self._late:
            self._our_turn = True
        else:
            self._late = True
            said = self._hearing.having("shares" if self.state is State.SHARED else "masked")
            before = (said & ((1 << self._us) - 1)).bit_count()
            self.deadline, self._our_turn = now + self._rules.turn_s * before, not before
        return ()

    def _share(self, now: float) -> tuple[Effect, ...]:
        """Give shares of our two secrets to everybody whose keys are here."""
        cohort, us, secrets = self._cohort, self._us, self._secrets
        holders = self._hearing.having("keys")
        if holders.bit_count() < cohort.threshold:
            return self._fail(f"only {holders.bit_count()} of its {len(cohort.members)} members gave keys")
        pairs = shares_of(secrets, self._entropy, self._name, cohort.threshold, len(cohort.members))
        self._pairs[us] = pairs[us]
        given = []
        for holder in places(holders):
            theirs = self._hearing.words[holder].keys.seal
            box = b"" if holder == us else seal_pair(pairs[holder], secrets.seal, theirs, self._name, us, holder)
            seed, key = (
                commitment(kind, self._name, us, holder, share)
                for kind, share in ((SEED, pairs[holder].seed), (KEY, pairs[holder].key))
            )
            given.append(Given(holder=holder, box=box, seed=seed, key=key))
        shares = Shares(seed=commitment(SECRET, self._name, us, us, secrets.seed), given=tuple(given))
        self._enter(State.SHARED, now + self._rules.step_s)
        return self._say(replace(self._word, shares=shares))

    def _go_among(self) -> int | None:
        """With whom to mask: all, once they have given shares. Late: with whom others did. 0: with nobody."""
        hearing, held = self._hearing, sum(1 << owner for owner in self._pairs)
        shared = hearing.having("shares") & held
        assert self._word.shares is not None
        complete = hearing.having("keys") & self._word.shares.holders & ~shared == 0
        if not complete and self._late:
            for among in hearing.most_masked():
                if among >> self._us & 1 and among & ~shared == 0 and self._enough(among) and hearing.covered(among):
                    return among
        if not complete and not self._our_turn:
            return None
        among = hearing.largest_covered(shared, self._us)
        return among if self._enough(among) else 0

    def _mask(self, among: int, now: float) -> tuple[Effect, ...]:
        if not among:
            return self._wait(now)
        self._among = among
        seeds = {
            number: pair_seed(self._secrets.mask, self._hearing.words[number].keys.mask, self._name)
            for number in places(among)
            if number != self._us
        }
        self._enter(State.MASKING)
        return (
            Mask(
                Pads(
                    add=(self._secrets.seed, *(seed for number, seed in seeds.items() if number > self._us)),
                    subtract=tuple(seed for number, seed in seeds.items() if number < self._us),
                )
            ),
        )

    def _go_by(self) -> int | None:
        """Which survivors to sign: everybody as soon as all are here. Late, what others signed. 0: none."""
        hearing = self._hearing
        hidden = {i: hearing.masked(i) for i in places(self._among) if i in self._fetched - hearing.caught}
        present = sum(1 << i for i, masked in hidden.items() if masked is not None and masked.among == self._among)
        if present == self._among:
            return present
        if self._late:
            lost = sum(1 << i for i in hearing.caught)
            signed = [
                (len(honest), one.members)
                for one, by in hearing.signed().items()
                if one.among == self._among and not one.members & lost and (honest := set(by) - hearing.caught)
            ]
            if signed:
                return max(signed)[1]
        if not self._our_turn:
            return None
        return present if self._enough(present) else 0

    def _reveal(self, survivors: int, now: float) -> tuple[Effect, ...]:
        """Sign a set of survivors, the only one, and give what unmasks its sum: never both secrets of anybody."""
        if not survivors:
            return self._wait(now)
        if self._word.reveal is not None:
            raise LocalProtocolError("a member of a cohort signs one set of survivors")
        shares = tuple(
            self._pairs[owner].seed if survivors >> owner & 1 else self._pairs[owner].key
            for owner in places(self._among)
        )
        view = self._hearing.view_of(self._among, survivors)
        effects = self._say(replace(self._word, reveal=Reveal(survivors=survivors, view=view, shares=shares)))
        return effects + self._wait(now) + self._advance(now)

    def _wait(self, now: float) -> tuple[Effect, ...]:
        rules = self._rules
        self._enter(State.WAITING, now + rules.step_s + rules.turn_s * len(self._cohort.members))
        return ()

    def _finish(self, chosen: Survivors, signers: tuple[int, ...]) -> tuple[Effect, ...]:
        """Everything is here: take off the pads of survivors, and those that they share with who vanished."""
        members, words = self._cohort.members, self._hearing.words
        add: list[bytes] = []
        subtract: list[bytes] = []
        for number in places(chosen.among):
            secret = self._hearing.secret(chosen, signers, number)
            if secret is None:
                blame = Blame(members[number], "what it gave shares of is not the secret that it committed to")
                return (blame, *self._fail("the secret of a member can't be put together"))
            if chosen.members >> number & 1:
                subtract.append(secret)
                continue
            for survivor in places(chosen.members):
                seed = pair_seed(secret, words[survivor].keys.mask, self._name)
                (subtract if number > survivor else add).append(seed)
        self.included = bool(chosen.members >> self._us & 1)
        self._enter(State.DONE)
        files = tuple(masked for i in places(chosen.members) if (masked := words[i].masked) is not None)
        return (Unmask(self._cohort.named(chosen.members), files, Pads(tuple(add), tuple(subtract))),)

    # ------------------------------------------------------------ small things

    def _enough(self, members: int) -> bool:
        return members.bit_count() >= self._cohort.threshold

    def _say(self, word: Word) -> tuple[Effect, ...]:
        self._word = word
        self._hearing.add(word)
        return (Say(word),)

    def _fail(self, reason: str) -> tuple[Effect, ...]:
        self._enter(State.FAILED)
        elsewhere = len(self._elsewhere)
        return (Fail(reason + (f"; {elsewhere} of them count on another cohort" if elsewhere else "")),)

    def _enter(self, state: State, deadline: float | None = None) -> None:
        self.state, self.deadline = state, deadline
        self._late = self._our_turn = False
