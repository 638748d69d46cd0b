"""Masked cohorts: keys, shares, masks, and what happens when a member vanishes or lies."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from protocols.codec import encode
from protocols.cohort import keys, shamir
from protocols.cohort import machine as machine_module
from protocols.cohort.cohorts import cohorts_of, threshold_of
from protocols.cohort.events import Begin, Expired, Heard, Stored
from protocols.cohort.machine import TRANSITIONS, CohortMachine, Rules, State
from protocols.cohort.masking import SCALE, Pads, Sum, masked, pad
from protocols.cohort.messages import COHORT_RECORD, MAX_WORD_BYTES, Reveal, Word, open_word, sign_word
from protocols.envelope import sign_record
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import DAG_CBOR, cid_of, cid_to_bytes
from tests.cohorts import NAMES, STEPS, Table, cohort_of
from tests.deltas import key_of, peer_of
from tests.vectors import Case, hold

ROOT = Path(__file__).resolve().parents[2]
CLOSE = 1e-5


# ---------------------------------------------------------------- parts


def test_cohorts_have_four_to_eight_members() -> None:
    for count in range(4, 100):
        names = [f"peer {i}" for i in range(count)]
        cohorts = cohorts_of(names)
        assert [name for cohort in cohorts for name in cohort] == names
        assert all(4 <= len(cohort) <= 8 for cohort in cohorts)
    assert cohorts_of(["a", "b", "c"]) == ()
    assert [threshold_of(members) for members in range(4, 9)] == [3, 4, 5, 5, 6]


def test_the_field_is_one() -> None:
    """Lucas-Lehmer: 2^521 - 1 is a prime."""
    value = 4
    for _ in range(521 - 2):
        value = (value * value - 2) % shamir.PRIME
    assert value == 0


def test_any_so_many_shares_give_the_secret() -> None:
    secret = int.from_bytes(bytes(range(224, 256)), "big")
    shares = shamir.split(secret, [3**i for i in range(1, 5)], 7)
    for chosen in combinations(range(7), 5):
        assert shamir.combine({i: shares[i] for i in chosen}) == secret
    assert shamir.combine({i: shares[i] for i in range(4)}) != secret


def test_keys_are_derived_by_hkdf() -> None:
    theirs = HKDF(SHA256(), 200, b"meshnode/cohort/1", b"info").derive(b"secret")
    assert keys.derived(b"secret", b"info", 200) == theirs


def test_two_members_share_a_pad_and_shares_travel_sealed() -> None:
    cohort = cohort_of(4).name
    ann, bob = (keys.Secrets.of(name * 32, cohort) for name in (b"a", b"b"))
    assert keys.pair_seed(ann.mask, keys.public(bob.mask), cohort) == keys.pair_seed(
        bob.mask, keys.public(ann.mask), cohort
    )
    pair = keys.shares_of(ann, b"a" * 32, cohort, 3, 4)[1]
    box = keys.seal_pair(pair, ann.seal, keys.public(bob.seal), cohort, 0, 1)
    assert len(box) == keys.BOX_BYTES
    assert keys.open_pair(box, bob.seal, keys.public(ann.seal), cohort, 0, 1) == pair
    for wrong in (box[:-1] + bytes([box[-1] ^ 1]), box[:10]):
        with pytest.raises(RemoteProtocolError, match="can't be opened"):
            keys.open_pair(wrong, bob.seal, keys.public(ann.seal), cohort, 0, 1)
    with pytest.raises(RemoteProtocolError, match="low order"):
        keys.agreed(ann.mask, bytes(32))


def test_masked_bytes_and_the_mean_are_what_they_always_were() -> None:
    vectors = [np.linspace(-3, k, 1000, dtype=np.float32) for k in (1, 2)]
    payloads = [masked(vectors[0], Pads(add=(b"s" * 32,))), masked(vectors[1], Pads(subtract=(b"s" * 32,)))]
    assert sha256(payloads[0]).hexdigest() == "05a413cc877496c02cfd2d263c9729b52c13091605b78234a97a867d68354d19"
    total = Sum(1000)
    for payload in payloads:
        total.add(payload)
    assert total.mean(Pads()) == pytest.approx(np.mean(vectors, axis=0), abs=1 / SCALE)
    with pytest.raises(RemoteProtocolError, match="1000 values take 4000"):
        total.add(payloads[0][:-4])


@pytest.mark.parametrize("value", [129.0, -129.0, np.nan, np.inf])
def test_what_does_not_fit_is_not_masked(value: float) -> None:
    with pytest.raises(LocalProtocolError, match="diverged"):
        masked(np.array([0, value], np.float32), Pads())


def test_masked_bytes_look_like_noise() -> None:
    """Chi-square of the bytes, and correlation with what they hide; one bit of the entropy changes all."""
    vector = np.full(50_000, 0.25, np.float32)
    payload = masked(vector, Pads(add=(b"x" * 32,), subtract=(b"y" * 32,)))
    counts = np.bincount(np.frombuffer(payload, np.uint8), minlength=256)
    chi = float(((counts - len(payload) / 256) ** 2 / (len(payload) / 256)).sum())
    assert abs(chi - 255) < 5 * (2 * 255) ** 0.5
    waves = np.sin(np.arange(50_000)).astype(np.float32)
    hidden = np.frombuffer(masked(waves, Pads(add=(b"x" * 32,))), "<i4")
    assert abs(np.corrcoef(waves, hidden)[0, 1]) < 0.02
    assert np.mean(pad(b"x" * 32, 1000) == pad(b"x" * 31 + b"y", 1000)) < 0.01


# ---------------------------------------------------------------- whole cohorts


def held(table: Table) -> None:
    """Everybody who is there has the mean of the same survivors, and nobody is blamed."""
    found = {member.survivors for member in table.there}
    assert len(found) == 1
    (survivors,) = found
    for member in table.there:
        assert member.mean is not None
        np.testing.assert_allclose(member.mean, table.mean(survivors), atol=CLOSE)
        assert not member.blamed


@pytest.mark.parametrize("count", range(4, 9))
def test_the_mean_is_exact_whoever_vanishes_and_when(count: int) -> None:
    most = count - threshold_of(count)
    for gone in range(most + 1):
        table = Table(count, seed=count)
        for k in range(gone):
            table.members[(3 * k + 1) % count].leaves = STEPS[(count + k) % 4]
        table.run()
        held(table)
        assert all(member.machine.included for member in table.there)


@pytest.mark.parametrize("step", STEPS[:4])
def test_with_too_few_there_is_no_mean(step: str) -> None:
    table = Table(4)
    for number in (1, 2):
        table.members[number].leaves = step
    table.run()
    assert {table.members[i].machine.state for i in (0, 3)} == {State.FAILED}
    assert all(re.search("too few|only 2 of its 4", table.members[i].failed) for i in (0, 3))
    if step == "masked":  # nobody may unmask two
        assert not any(a and b for a, b in table.revealed().values())


def test_who_is_late_takes_the_mean_of_the_others() -> None:
    table = Table(4)
    table.starts = lambda number: 310.0 if number == 2 else 0.0
    table.run()
    held(table)
    assert [member.machine.included for member in table.members] == [True, True, False, True]


def test_who_missed_a_round_is_not_waited_for_as_long() -> None:
    table = Table(4)
    table.members[1].leaves = "nothing"
    table.behind = frozenset({table.cohort.members[1]})
    table.run(until=100)
    held(table)


def test_members_that_count_on_others_have_no_mean() -> None:
    table = Table(4)
    other = cohort_of(5)
    for number in (2, 3):
        member = table.members[number]
        member.machine = CohortMachine(other.members[number], other, table.rules, bytes(32))
    table.run()
    assert "2 of them count on another cohort" in table.members[0].failed


# ---------------------------------------------------------------- liars


def lied(change: Callable[[Word, int], Word], count: int = 4, liar: int = 1) -> Table:
    table = Table(count)
    table.members[liar].lies = change
    table.run()
    return table


def wrong_box(word: Word, listener: int) -> Word:
    if word.shares is None or listener != 0:
        return word
    given = tuple(replace(one, box=b"\0" * len(one.box)) if one.holder == 0 else one for one in word.shares.given)
    return replace(word, shares=replace(word.shares, given=given))


def wrong_share(word: Word, _listener: int) -> Word:
    if word.reveal is None:
        return word
    return replace(word, reveal=replace(word.reveal, shares=(bytes(66),) * len(word.reveal.shares)))


def wrong_seed(word: Word, _listener: int) -> Word:
    return word if word.shares is None else replace(word, shares=replace(word.shares, seed=bytes(32)))


def wrong_size(word: Word, _listener: int) -> Word:
    return word if word.masked is None else replace(word, masked=replace(word.masked, size=8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (wrong_share, "a share that it was not given"),
        (wrong_size, "has 8 bytes"),
    ],
)
def test_a_liar_is_named_and_the_others_have_their_mean(change: Any, words: str) -> None:
    table = lied(change)
    honest = [table.members[i] for i in (0, 2, 3)]
    assert any(number == 1 and words in reason for member in honest for number, reason in member.blamed)
    assert all(number == 1 for member in honest for number, _ in member.blamed)
    for member in honest:
        assert member.mean is not None, member.failed
        np.testing.assert_allclose(member.mean, table.mean(member.survivors), atol=CLOSE)


def test_a_box_with_other_shares_leaves_its_sender_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its receiver can tell; with the others' help it has the mean all the same."""

    def seal(pair: keys.Pair, secret: bytes, theirs: bytes, cohort: bytes, sender: int, receiver: int) -> bytes:
        pair = keys.Pair(bytes(66), bytes(66)) if (sender, receiver) == (1, 0) else pair
        return keys.seal_pair(pair, secret, theirs, cohort, sender, receiver)

    monkeypatch.setattr(machine_module, "seal_pair", seal)
    table = Table(5)
    table.run()
    assert table.members[0].blamed == [(1, "the shares that it sealed are not what it says")]
    for member in table.members:
        assert member.mean is not None, member.failed
        np.testing.assert_allclose(member.mean, table.mean(member.survivors), atol=CLOSE)


def test_shares_of_no_such_secret_end_the_round_and_name_the_member() -> None:
    table = lied(wrong_seed)
    for member in (table.members[i] for i in (0, 2, 3)):
        assert member.machine.state is State.FAILED
        assert [number for number, reason in member.blamed if "committed to" in reason] == [1]


def test_who_tells_different_things_makes_nobody_else_a_liar() -> None:
    """bob's box for ann says another thing to ann than to the others; so what they have heard differs."""
    table = lied(wrong_box)
    assert all(
        number == 1 for member in table.members if member is not table.members[1] for number, _ in member.blamed
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda word: replace(word, members=word.members[::-1]), "two cohorts"),
        (lambda word: replace(word, keys=replace(word.keys, seal=word.keys.mask)), "two sets of keys"),
        (lambda word: replace(word, shares=replace(word.shares, seed=bytes(32))), "two sets of shares"),
        (lambda word: replace(word, masked=replace(word.masked, size=8)), "two masked vectors"),
        (lambda word: replace(word, reveal=replace(word.reveal, survivors=7)), "two sets of survivors"),
    ],
)
def test_a_contradiction_is_named_and_counts_for_nothing(change: Callable[[Word], Word], words: str) -> None:
    table = Table(4)
    table.run()
    said = [member.said[-1] for member in table.members]
    machine = CohortMachine(table.cohort.members[0], table.cohort, table.rules, bytes(32))
    machine.handle(Begin(), 0.0)
    machine.handle(Heard(said[1]), 0.0)
    (blame,) = [effect for effect in machine.handle(Heard(change(said[1])), 0.0) if hasattr(effect, "reason")]
    assert words in blame.reason
    assert blame.peer == table.cohort.members[1]
    assert machine.handle(Heard(change(said[1])), 0.0) == ()


def test_nobody_signs_two_sets_of_survivors() -> None:
    """Whatever comes, the machine reveals once; were it ordered to again, it would refuse."""
    table = Table(4)
    table.run()
    machine = table.members[0].machine
    assert sum(word.reveal is not None for word in table.members[0].said) == 1
    with pytest.raises(LocalProtocolError, match="signs one set"):
        machine._reveal(7, 0.0)


# ---------------------------------------------------------------- words


@pytest.fixture(scope="module")
def full() -> Word:
    """The last word of the first of eight."""
    table = Table(8)
    table.run()
    return table.members[0].said[-1]


def test_the_largest_word_fits(full: Word) -> None:
    data = sign_word(key_of("ann"), replace(full, round=1 << 40))
    assert len(data) < 3300 < MAX_WORD_BYTES
    with pytest.raises(RemoteProtocolError, match="limit is 4096"):
        open_word(bytes(MAX_WORD_BYTES + 1))


def changed(word: Word, part: str, **fields: Any) -> Word:
    return replace(word, **{part: replace(getattr(word, part), **fields)})


def test_what_no_word_says(full: Word) -> None:
    shares, reveal = full.shares, full.reveal
    assert shares is not None
    assert reveal is not None
    ours, theirs = shares.given[:2]
    cases = [
        (replace(full, peer=peer_of("bob")), "speaks for itself alone"),
        (replace(full, members=full.members[:3], shares=None, masked=None, reveal=None), "names no cohort"),
        (replace(full, members=(*full.members[:7], full.members[0])), "names no cohort"),
        (replace(full, members=(peer_of("zoe"), *full.members[1:])), "names no cohort"),
        (replace(full, members=(*full.members[:7], "nobody")), "peer id"),
        (changed(full, "keys", mask=bytes(32)), "low order"),
        (changed(full, "shares", given=shares.given[::-1]), "twice"),
        (changed(full, "shares", given=shares.given[1:]), "nobody"),
        (changed(full, "shares", given=(replace(ours, box=theirs.box), *shares.given[1:])), "gives"),
        (changed(full, "shares", given=(ours, replace(theirs, box=b""), *shares.given[2:])), "gives"),
        (replace(full, members=full.members[:7]), "strangers"),
        (replace(full, shares=None), "no shares of it"),
        (changed(full, "masked", among=254), "no shares of it"),
        (changed(full, "masked", cid=cid_to_bytes(cid_of(DAG_CBOR, b"x"))), "no CID of a file"),
        (replace(full, masked=None), "not masked among"),
        (changed(replace(full, reveal=None), "masked", among=127), ""),
        (changed(full, "masked", among=127), "not masked among"),
        (changed(full, "reveal", shares=reveal.shares[1:]), "one share of each"),
        (changed(full, "reveal", shares=(b"\xff" * 66, *reveal.shares[1:])), "one share of each"),
        (changed(full, "reveal", shares=(b"\0", *reveal.shares[1:])), "one share of each"),
    ]  # fmt: skip
    for word, words in cases:
        data = sign_word(key_of("ann"), word)
        if not words:
            assert open_word(data) == word
            continue
        with pytest.raises(RemoteProtocolError, match=words):
            open_word(data)


def test_vectors() -> None:
    table = Table(4)
    table.run()
    ann = table.members[0].said
    last = ann[-1]
    cases = [
        *(
            Case(name, sign_word(key_of("ann"), word), word)
            for name, word in zip(("keys", "shares", "masked", "reveal"), ann, strict=True)
        ),
        Case("another-signer", sign_record(key_of("bob"), COHORT_RECORD, encode(last))),
        Case("another-domain", sign_record(key_of("ann"), "advert", encode(last))),
        Case("a-key-of-low-order", sign_word(key_of("ann"), changed(last, "keys", seal=bytes(32)))),
        Case("survivors-that-were-not-masked-among", sign_word(key_of("ann"), changed(last, "reveal", survivors=31))),
        Case("truncated", sign_word(key_of("ann"), last)[:-1]),
        Case("empty", b""),
    ]
    hold("cohort", cases, open_word)


# ---------------------------------------------------------------- the machine


def test_the_specification_shows_the_transitions() -> None:
    text = (ROOT / "protocols/cohort/SPEC.md").read_text()
    table = re.findall(r"^\| (\w+) \| (\w+) \| ([\w ]+) \|$", text.split("<!-- transitions -->")[1], re.MULTILINE)
    shown = {(state, event): set(following.split(" or ")) for state, event, following in table if state != "State"}
    assert shown == {
        (state.value, event.__name__): {one.value for one in following}
        for (state, event), following in TRANSITIONS.items()
    }


def test_a_stranger_has_no_machine_and_events_out_of_turn_are_refused() -> None:
    cohort = cohort_of(4)
    with pytest.raises(LocalProtocolError, match="no member"):
        CohortMachine(peer_of(NAMES[5]), cohort, Rules(parameters=1), bytes(32))
    machine = CohortMachine(cohort.members[0], cohort, Rules(parameters=1), bytes(32))
    for event in (Expired(), Stored(bytes(36), 4)):
        with pytest.raises(LocalProtocolError, match="does not expect"):
            machine.handle(event, 0.0)


def test_words_of_other_rounds_are_left_alone() -> None:
    table = Table(4)
    table.run()
    machine = CohortMachine(table.cohort.members[0], table.cohort, table.rules, bytes(32))
    machine.handle(Begin(), 0.0)
    word = table.members[1].said[-1]
    for other in (replace(word, round=4), replace(word, lineage=bytes(32)), table.members[0].said[-1]):
        assert machine.handle(Heard(other), 0.0) == ()


def test_a_set_that_stands_on_other_words_is_not_followed() -> None:
    table = Table(4)

    def other_view(word: Word, _listener: int) -> Word:
        reveal = word.reveal
        return (
            word
            if reveal is None
            else replace(word, reveal=Reveal(survivors=15, view=bytes(32), shares=reveal.shares))
        )

    table.members[1].lies = other_view
    table.run()
    assert all(table.members[i].mean is not None for i in (0, 2, 3)), "three are enough"
    assert not any(member.blamed for member in table.members)
