"""What the members of one cohort have said, each at most one thing of each kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256

from protocols.codec import encode
from protocols.cohort.cohorts import Cohort, places
from protocols.cohort.keys import Pair, commitment, public
from protocols.cohort.messages import Given, Masked, Word, contradiction
from protocols.cohort.shamir import combine
from protocols.ids import PeerId

SEED, KEY = b"seed", b"key"  # a share of one of the two secrets of a member
SECRET = b"secret"  # the seed itself


@dataclass(frozen=True, slots=True)
class Survivors:
    """A set of survivors, and what it stands on."""

    among: int
    members: int
    view: bytes


class Hearing:
    """The newest words of a cohort's members, by number."""

    def __init__(self, cohort: Cohort) -> None:
        self._cohort = cohort
        self._name = cohort.name
        self.words: dict[int, Word] = {}
        self._digests: dict[int, bytes] = {}
        self.caught: set[int] = set()  # who did what no honest member does: nothing is begun with them
        self._false: set[int] = set()  # whose shares are not those that they were given

    def add(self, word: Word) -> str | None:
        """Take a word of a member. What it contradicts, if it does; what was said first stays."""
        number = self._cohort.members.index(PeerId(word.peer))
        known = self.words.get(number)
        said = None if known is None else contradiction(known, word)
        if said is None and (known is None or word.steps > known.steps) and self._ours(word):
            self.words[number] = word
        if said is None or number in self.caught:
            return None
        self.caught.add(number)
        return said

    def _ours(self, word: Word) -> bool:
        return word.members == self._cohort.members

    # ------------------------------------------------------------ sets of members

    def having(self, step: str) -> int:
        """Who has said its "keys", "shares" or "masked", except those that were caught."""
        return sum(
            1 << number
            for number, word in self.words.items()
            if getattr(word, step) is not None and number not in self.caught
        )

    def masked(self, number: int) -> Masked | None:
        word = self.words.get(number)
        return None if word is None else word.masked

    def given(self, owner: int, holder: int) -> Given | None:
        """What an owner says that it gave to a holder."""
        word = self.words.get(owner)
        if word is None or word.shares is None:
            return None
        return next((one for one in word.shares.given if one.holder == holder), None)

    def gave(self, holder: int) -> bool:
        """Whether anybody has given shares to this member."""
        return any(self._holders(number) >> holder & 1 for number in self.words if number not in self.caught)

    def covered(self, among: int) -> bool:
        """Whether each of these has given shares to all of them."""
        return all(self._holders(number) & among == among for number in places(among))

    def _holders(self, number: int) -> int:
        word = self.words.get(number)
        return 0 if word is None or word.shares is None else word.shares.holders

    def largest_covered(self, members: int, us: int) -> int:
        """A set with us in which each has given shares to all: leaves out who lacks the others' most often."""
        mine = self._holders(us)
        members &= mine
        members = sum(1 << i for i in places(members) if self._holders(i) >> us & 1)
        while members and not self.covered(members):
            lacks = {
                i: sum(1 for j in places(members) if not self._holders(i) >> j & self._holders(j) >> i & 1)
                for i in places(members)
                if i != us
            }
            members &= ~(1 << max(lacks, key=lambda i: (lacks[i], i)))
        return members

    def most_masked(self) -> tuple[int, ...]:
        """The sets that members have masked among, those of most members first."""
        said = [word.masked.among for word in self.words.values() if word.masked is not None]
        return tuple(sorted(set(said), key=lambda among: (-said.count(among), among)))

    # ------------------------------------------------------------ survivors

    def view_of(self, among: int, survivors: int) -> bytes:
        """Hash of all words that a set of survivors stands on: two members that have heard different things never
        take each other's sets for the same."""
        digest = sha256(b"meshnode/cohort/1/view" + self._name + bytes((among, survivors)))
        for number in places(among):
            digest.update(self._digest(number))
        for number in places(survivors):
            masked = self.words[number].masked
            assert masked is not None
            digest.update(masked.cid)
        return digest.digest()

    def _digest(self, number: int) -> bytes:
        """Hash of the first two steps of a member's word, which stay as they are."""
        if number not in self._digests:
            first = replace(self.words[number], masked=None, reveal=None)
            self._digests[number] = sha256(encode(first)).digest()
        return self._digests[number]

    def holds(self, among: int, survivors: int) -> bool:
        """Whether all have been heard that a set stands on, and it can come to a mean."""
        hidden = [self.masked(i) for i in places(survivors)]
        return (
            survivors & ~among == 0
            and survivors.bit_count() >= self._cohort.threshold
            and self.covered(among)
            and all(one is not None and one.among == among for one in hidden)
        )

    def signed(self) -> Mapping[Survivors, tuple[int, ...]]:
        """The sets that members have signed and that hold as we have heard it, with their signers."""
        found: dict[Survivors, list[int]] = {}
        for number, word in sorted(self.words.items()):
            if word.reveal is None or word.masked is None or number in self._false:
                continue
            among, survivors = word.masked.among, word.reveal.survivors
            if self.holds(among, survivors) and word.reveal.view == self.view_of(among, survivors):
                found.setdefault(Survivors(among, survivors, word.reveal.view), []).append(number)
        return {one: tuple(signers) for one, signers in found.items()}

    def liars(self) -> tuple[int, ...]:
        """Signers, heard since the last time, whose shares are not those that they were given."""
        wrong = [
            number
            for chosen, signers in self.signed().items()
            for number in signers
            if not self._revealed_truly(chosen, number)
        ]
        self._false.update(wrong)
        self.caught.update(wrong)
        return tuple(wrong)

    def _revealed_truly(self, chosen: Survivors, holder: int) -> bool:
        reveal = self.words[holder].reveal
        assert reveal is not None
        for owner, share in zip(places(chosen.among), reveal.shares, strict=True):
            survives = chosen.members >> owner & 1
            given = self.given(owner, holder)
            assert given is not None, "`holds` has seen to it"
            said = given.seed if survives else given.key
            if commitment(SEED if survives else KEY, self._name, owner, holder, share) != said:
                return False
        return True

    def secret(self, chosen: Survivors, signers: Iterable[int], owner: int) -> bytes | None:
        """The secret of a member that enough have revealed; None if it gave shares of no such secret."""
        at = places(chosen.among).index(owner)
        shares = {}
        for signer in sorted(signers)[: self._cohort.threshold]:
            reveal = self.words[signer].reveal
            assert reveal is not None
            shares[signer] = int.from_bytes(reveal.shares[at], "big")
        found = combine(shares)
        if found.bit_length() > 256:
            return None
        secret, word = found.to_bytes(32, "big"), self.words[owner]
        assert word.shares is not None
        if chosen.members >> owner & 1:
            fits = commitment(SECRET, self._name, owner, owner, secret) == word.shares.seed
        else:
            fits = public(secret) == word.keys.mask
        return secret if fits else None


def true_pair(given: Given, pair: Pair, cohort: bytes, owner: int, holder: int) -> bool:
    """Whether the shares in a box are those that were committed to in public."""
    return (
        commitment(SEED, cohort, owner, holder, pair.seed) == given.seed
        and commitment(KEY, cohort, owner, holder, pair.key) == given.key
    )
