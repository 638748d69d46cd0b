"""What a member says in the course of one cohort: one signed word, which grows with every step. See SPEC.md.

The content of a notice of the kind "cohort" (`protocols/notice`) holds the signed words of a member's last rounds, so
what was said stays said; two words of one member and round that differ in anything that both say are a contradiction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nacl.signing import SigningKey

from protocols.codec import at, decode, encode
from protocols.cohort.cohorts import LEAST, MOST, places
from protocols.cohort.keys import BOX_BYTES, KEY_BYTES, agreed
from protocols.cohort.shamir import PRIME, SHARE_BYTES
from protocols.delta.messages import MAX_ROUND, name_of
from protocols.envelope import open_record, sign_record
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_PB, RAW, Cid, PeerId, cid_codec, public_key_of, short

COHORT_RECORD: Final = "cohort-record"  # domain of the signed word
MAX_WORD_BYTES: Final = 4096  # with all steps of a cohort of eight it has about 3100
KEPT: Final = 2  # rounds whose words a notice holds: who is a step behind still reads the one before
MAX_MASKED: Final = 1 << 28  # bytes; the largest frame takes all of them
HASH_BYTES: Final = 32
_EVERYBODY: Final = (1 << MOST) - 1
_PROBE: Final = bytes((1, *(31 * [0])))  # any secret key does


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """X25519 public keys, fresh for this cohort."""

    seal: bytes = at(1, size=KEY_BYTES)
    mask: bytes = at(2, size=KEY_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The shares that one member gets."""

    holder: int = at(1, high=MOST - 1)
    box: bytes = at(2, limit=BOX_BYTES, default=b"")  # empty: our own shares
    seed: bytes = at(3, size=HASH_BYTES)  # commitments to the two shares
    key: bytes = at(4, size=HASH_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    seed: bytes = at(1, size=HASH_BYTES)  # commitment to the seed itself
    given: tuple[Given, ...] = at(2, limit=MOST)  # by holder, ascending

    @property
    def holders(self) -> int:
        """The set of those that got shares."""
        return sum(1 << one.holder for one in self.given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    among: int = at(1, low=1, high=_EVERYBODY)  # the set of members whose pads are in it
    cid: bytes = at(2, size=36)  # of the file
    size: int = at(3, low=1, high=MAX_MASKED)  # bytes

    @property
    def name(self) -> Cid:
        return name_of(self.cid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reveal:
    """The set that this member takes for the survivors, and its share of one secret of each member that was masked
    among: of the seed of a survivor, of the mask key of another."""

    survivors: int = at(1, low=1, high=_EVERYBODY)
    view: bytes = at(2, size=HASH_BYTES)  # hash of the words that it stands on (`machine.view_of`)
    shares: tuple[bytes, ...] = at(3, limit=MOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    peer: str = at(1, limit=64)  # the signer
    lineage: bytes = at(2, size=HASH_BYTES)  # SHA-256 of its name
    round: int = at(3, high=MAX_ROUND)
    members: tuple[str, ...] = at(4, limit=MOST)  # of the cohort, in its order
    keys: Keys = at(5)
    shares: Shares | None = at(6, default=None)
    masked: Masked | None = at(7, default=None)
    reveal: Reveal | None = at(8, default=None)

    @property
    def steps(self) -> int:
        """How much of it has been said."""
        return sum(part is not None for part in (self.keys, self.shares, self.masked, self.reveal))

    @property
    def place(self) -> int:
        """The number of the signer."""
        return self.members.index(self.peer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The content of a notice."""

    signed: tuple[bytes, ...] = at(1, limit=KEPT)  # newest first


def sign_word(key: SigningKey, word: Word) -> bytes:
    """The signed word. Raises LocalProtocolError for a field out of its limits."""
    return sign_record(key, COHORT_RECORD, encode(word))


def read_words(content: bytes) -> tuple[bytes, ...]:
    """The signed words in a notice, not opened yet. Raises RemoteProtocolError."""
    return decode(Words, content).signed


def open_word(data: bytes) -> Word:
    """Check a signed word and everything in it that needs no knowledge of the network.

    Raises:
      RemoteProtocolError: too large, damaged, forged, of another signer, or it says what no word says.
    """
    if len(data) > MAX_WORD_BYTES:
        raise RemoteProtocolError(f"A word to a cohort has {len(data)} bytes; the limit is {MAX_WORD_BYTES}.")
    opened = open_record(data, domain=COHORT_RECORD)
    word = decode(Word, opened.payload)
    check_word(word, opened.signer)
    return word


def check_word(word: Word, signer: PeerId) -> None:
    """Raise RemoteProtocolError unless the word is the signer's own and says what a word can say."""
    if word.peer != signer:
        raise RemoteProtocolError(f"{signer} signed a word of {word.peer[:64]}; a member speaks for itself alone.")
    who = f"a word of {short(signer)} to its cohort"
    for member in word.members:
        public_key_of(member)
    distinct = set(word.members)
    if len(distinct) < LEAST or len(distinct) != len(word.members) or signer not in distinct:
        raise RemoteProtocolError(f"{_upper(who)} names no cohort of {LEAST} to {MOST} with its signer among them.")
    for key in (word.keys.seal, word.keys.mask):
        agreed(_PROBE, key)
    _check_steps(word, who)


def _check_steps(word: Word, who: str) -> None:
    us, everybody = 1 << word.place, (1 << len(word.members)) - 1
    shares, hidden, reveal = word.shares, word.masked, word.reveal
    holders = 0 if shares is None else shares.holders
    if shares is not None:
        named = [one.holder for one in shares.given]
        boxed = all(len(one.box) == (0 if 1 << one.holder == us else BOX_BYTES) for one in shares.given)
        if named != sorted(set(named)) or not boxed or not holders & us or holders & ~everybody:
            raise RemoteProtocolError(f"{_upper(who)} gives shares to nobody, to somebody twice, or to strangers.")
    if hidden is not None:
        if shares is None or hidden.among & ~holders or not hidden.among & us:
            raise RemoteProtocolError(f"{_upper(who)} is masked among members that have no shares of it.")
        _check_file(hidden.cid, who)
    if reveal is not None:
        if hidden is None or reveal.survivors & ~hidden.among:
            raise RemoteProtocolError(f"{_upper(who)} names survivors that were not masked among.")
        if len(reveal.shares) != len(places(hidden.among)) or not all(map(_is_share, reveal.shares)):
            raise RemoteProtocolError(f"{_upper(who)} does not reveal one share of each member.")


def _is_share(data: bytes) -> bool:
    return len(data) == SHARE_BYTES and int.from_bytes(data, "big") < PRIME


def _check_file(cid: bytes, who: str) -> None:
    try:
        fits = cid_codec(name_of(cid)) in (RAW, DAG_PB)
    except RemoteProtocolError:
        fits = False
    if not fits:
        raise RemoteProtocolError(f"{_upper(who)} names its masked vector by no CID of a file.")


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def contradiction(one: Word, other: Word) -> str | None:
    """What two words of one member and round say differently, in words; None when they do not."""
    if (one.peer, one.lineage, one.round) != (other.peer, other.lineage, other.round):
        return None
    if one.members != other.members:
        return "two cohorts"
    if one.keys != other.keys:
        return "two sets of keys"
    for name, words in (
        ("shares", "two sets of shares"),
        ("masked", "two masked vectors"),
        ("reveal", "two sets of survivors"),
    ):
        first, second = getattr(one, name), getattr(other, name)
        if first is not None and second is not None and first != second:
            return words
    return None
