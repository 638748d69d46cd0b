"""Records of deltas: what they say, who contradicts itself, which of them is in which."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from protocols.codec import encode
from protocols.delta import checks
from protocols.delta.checks import Expected, Refusal, Why, judge_age, judge_payload, judge_record
from protocols.delta.codec import largest_payload, pack_delta
from protocols.delta.lineage import KEPT_RECORDS, MAX_ENTRIES, Lineage
from protocols.delta.messages import (
    DELTA_RECORD,
    MAX_RECORD_BYTES,
    Codec,
    DeltaRecord,
    Equivocation,
    Position,
    Privacy,
    contradiction,
    open_delta,
    prove,
    record_cid,
    sign_delta,
)
from protocols.envelope import sign_record
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, RAW, cid_of, cid_to_bytes
from tests.deltas import FRAME, delta_cid, key_of, made, peer_of, record, signed
from tests.vectors import Case, hold

FULL = record(
    "ann",
    7,
    1,
    parents=[cid_of(RAW, b"one"), cid_of(RAW, b"two")],
    recent=2,
    base=cid_to_bytes(cid_of(DAG_CBOR, b"an adapter")),
    codec=Codec.SPARSE,
    adds=True,
    whole=made("ann whole", 7, 1),
    steps=20,
    samples=160,
    loss_before_milli=1500,
    loss_after_milli=700,
    privacy=Privacy(epsilon_milli=8000, delta_nano=10_000, sigma_milli=620, clip_milli=1000),
)
ADAPTER = FULL.base
FOREIGN = cid_to_bytes(cid_of(DAG_CBOR, b"another frame"))
NO_CID = bytes(36)


def test_a_record_is_opened_as_it_was_signed() -> None:
    assert open_delta(sign_delta(key_of("ann"), FULL)) == FULL
    assert open_delta(signed("bob", 0)) == record("bob", 0)
    assert FULL.position == (7, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peer": peer_of("bob")}, "speaks for itself alone"),
        ({"frame": NO_CID}, "The frame of a delta"),
        ({"frame": cid_to_bytes(cid_of(RAW, b"x"))}, "The frame of a delta"),
        ({"base": b"short"}, "The base of a delta"),
        ({"made": replace(FULL.made, cid=NO_CID)}, "A delta of"),
        ({"parents": FULL.parents[::-1]}, "not sorted"),
        ({"parents": FULL.parents[:1] * 2}, "come twice"),
        ({"parents": (b"short",)}, "A parent of a delta"),
        ({"recent": FULL.recent[::-1]}, "do not go back in time"),
        ({"recent": (made("ann", 7, 1),)}, "do not go back in time"),
        ({"recent": (made("ann", 8),)}, "do not go back in time"),
        ({"whole": None}, "adds without naming the whole"),
        ({"adds": False}, "or the reverse"),
        ({"whole": made("ann whole", 7, 0)}, "adds without naming the whole of its position"),
    ],
)
def test_what_no_record_says(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        open_delta(sign_record(key_of("ann"), DELTA_RECORD, encode(replace(FULL, **change))))


def test_other_records_are_no_deltas() -> None:
    with pytest.raises(RemoteProtocolError, match="'advert' where 'delta-record' is expected"):
        open_delta(sign_record(key_of("ann"), "advert", encode(FULL)))
    with pytest.raises(RemoteProtocolError, match="the limit is 2048"):
        open_delta(bytes(2049))
    data = bytearray(signed("ann", 1))
    data[-1] ^= 1
    with pytest.raises(RemoteProtocolError, match="signature"):
        open_delta(bytes(data))


def test_the_largest_record_fits() -> None:
    late = replace(FULL.made, round=1 << 40)
    largest = replace(
        FULL,
        made=late,
        whole=late,
        parents=tuple(sorted(cid_to_bytes(cid_of(RAW, bytes([i]))) for i in range(16))),
        recent=tuple(made("ann", 99 - i) for i in range(8)),
    )
    data = sign_delta(key_of("ann"), largest)
    assert open_delta(data) == largest
    assert len(data) <= MAX_RECORD_BYTES


# ---------------------------------------------------------------- contradictions


def other(name: str, number: int, **fields: Any) -> DeltaRecord:
    """The same position, another delta."""
    return record(name, number, made=made(f"{name} lies", number), **fields)


def test_two_deltas_for_one_position_prove_themselves() -> None:
    one, two = signed("eve", 3), sign_delta(key_of("eve"), other("eve", 3))
    proof = prove(Equivocation(first=one, second=two))
    assert (proof.peer, proof.position) == (peer_of("eve"), Position(3, 0))
    assert set(proof.cids) == {delta_cid("eve", 3), delta_cid("eve lies", 3)}


def test_a_lie_of_earlier_rounds_shows_in_later_records() -> None:
    """Each record names the eight deltas before it."""
    lied = record("eve", 5, recent=4)
    recent = (lied.recent[0], made("eve lies", 3), *lied.recent[2:])
    assert contradiction(lied, record("eve", 6, recent=6)) is None
    assert contradiction(replace(lied, recent=recent), record("eve", 6, recent=6)) == Position(3, 0)
    assert contradiction(replace(lied, recent=recent), record("ann", 6, recent=6)) is None
    assert contradiction(replace(lied, recent=recent), record("eve", 6, recent=6, frame=FOREIGN)) is None


def test_what_proves_nothing_is_no_proof() -> None:
    for one, two in ((signed("eve", 3), signed("eve", 3)), (signed("eve", 3), signed("eve", 4, recent=2))):
        with pytest.raises(RemoteProtocolError, match="and they do not"):
            prove(Equivocation(first=one, second=two))
    with pytest.raises(RemoteProtocolError):
        prove(Equivocation(first=signed("eve", 3), second=signed("eve", 3)[:-1]))


# ---------------------------------------------------------------- lineage


def family() -> dict[str, bytes]:
    """a and b are mixed into c; c and a later d into e; f stands alone."""
    out = {"a": signed("ann", 1), "b": signed("bob", 1)}
    out["c"] = signed("ann", 2, parents=[record_cid(out["a"]), record_cid(out["b"])])
    out["d"] = signed("bob", 2)
    out["e"] = signed("bob", 3, parents=[record_cid(out["c"]), record_cid(out["d"])])
    out["f"] = signed("cat", 3)
    return out


def lineage_of(records: list[bytes]) -> Lineage:
    lineage = Lineage(FRAME.cid)
    for data in records:
        assert lineage.add(data, open_delta(data)) is None
    return lineage


def letters(entries: Any) -> str:
    names = {record_cid(data): letter for letter, data in family().items()}
    return "".join(sorted(names[getattr(entry, "cid", entry)] for entry in entries))


def test_what_is_in_what() -> None:
    records = family()
    cids = {letter: record_cid(data) for letter, data in records.items()}
    lineage = lineage_of(list(records.values()))
    assert letters(lineage.ancestors(cids["e"])) == "abcde"
    assert letters(lineage.ancestors(cids["c"])) == "abc"
    assert letters(lineage.influence(cids["b"])) == "bce"
    assert letters(lineage.heads) == "ef"
    assert [entry.position.round for entry in lineage.lacks([cids["c"]], cids["e"])] == [2, 3]
    assert letters(lineage.lacks([], cids["e"])) == "abcde"
    assert lineage.lacks([cids["e"]], cids["a"]) == ()
    entry = lineage.get(cids["a"])
    assert entry is not None
    assert (entry.delta, entry.peer) == (delta_cid("ann", 1), peer_of("ann"))


def test_the_order_of_arrival_does_not_matter() -> None:
    records = list(family().values())
    first = lineage_of(records)
    e = record_cid(records[4])
    for order in list(permutations(records))[::37]:
        again = lineage_of(list(order))
        assert again.heads == first.heads
        assert again.ancestors(e) == first.ancestors(e)


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_ENTRIES >= 1024
    monkeypatch.setattr("protocols.delta.lineage.MAX_ENTRIES", 3)
    records = list(family().values())
    left = {
        letters(entry for data in records if (entry := lineage_of(order).get(record_cid(data))))
        for order in (records, records[::-1])
    }
    assert left in ({"cef"}, {"def"})  # c and d are of one round; which goes is the same for all


def test_records_of_other_frames_are_left_alone() -> None:
    data = signed("ann", 1, frame=FOREIGN)
    lineage = lineage_of([data])
    assert lineage.get(record_cid(data)) is None


def test_a_liar_is_caught_once() -> None:
    lineage = Lineage(FRAME.cid)
    for number in range(1, 2 * KEPT_RECORDS):
        data = signed("eve", number, recent=8)
        assert lineage.add(data, open_delta(data)) is None
    lie = sign_delta(key_of("eve"), other("eve", 2 * KEPT_RECORDS - 3))
    proof = lineage.add(lie, open_delta(lie))
    assert proof is not None
    assert prove(proof).position == Position(2 * KEPT_RECORDS - 3, 0)
    assert lineage.add(lie, open_delta(lie)) is None
    assert dict(lineage.proofs) == {peer_of("eve"): proof}


# ---------------------------------------------------------------- checks

EXPECTED = Expected(frame=FRAME.cid, parameters=FRAME.parameters, base=None, round=10, adds=False)


def why(
    one: DeltaRecord, expected: Expected = EXPECTED, *, may_train: bool = True, last: DeltaRecord | None = None
) -> Why | None:
    found = judge_record(one, expected, may_train=may_train, last=last)
    assert found is None or found.sentence
    return None if found is None else found.why


def test_records_are_checked_before_anything_is_fetched() -> None:
    good = record("ann", 10)
    assert why(good) is None
    assert why(good, last=record("ann", 9, 3)) is None
    assert why(good, may_train=False) is Why.ROLE
    assert why(record("ann", 10, frame=FOREIGN)) is Why.FRAME
    assert why(record("ann", 10, base=ADAPTER)) is Why.LINEAGE
    assert why(good, last=good) is Why.REPLAYED
    assert why(good, last=record("ann", 11)) is Why.REPLAYED
    assert why(good, last=other("ann", 10)) is Why.EQUIVOCATED
    assert why(record("ann", 10, adds=True, whole=made("ann", 10))) is Why.KIND
    most = largest_payload(Codec.INT8, FRAME.parameters)
    assert why(record("ann", 10, made=replace(good.made, size=most))) is None
    assert why(record("ann", 10, made=replace(good.made, size=most + 1))) is Why.SIZE
    added = record(
        "ann",
        10,
        adds=True,
        codec=Codec.SPARSE,
        made=replace(good.made, size=30),
        whole=replace(good.made, size=most + 1),
    )
    assert why(added, replace(EXPECTED, adds=True)) is Why.SIZE


def test_deltas_of_other_times_are_not_used() -> None:
    found = {number: judge_age(record("ann", number), EXPECTED) for number in (5, 6, 14, 15)}
    assert [refusal and refusal.why for refusal in found.values()] == [Why.STALE, None, None, Why.AHEAD]


def test_a_peer_that_is_behind_is_told_so() -> None:
    refusal = judge_record(
        record("ann", 10), replace(EXPECTED, base=cid_of(DAG_CBOR, b"new")), may_train=True, last=None
    )
    assert refusal is not None
    assert "counts from the start of its frame; this node's from the adapter …" in refusal.sentence
    assert "takes the newest adapter first" in refusal.sentence


def test_payloads_are_checked_before_they_are_used() -> None:
    vector = np.linspace(-1, 1, FRAME.parameters, dtype=np.float32)
    payload = pack_delta(Codec.INT8, vector).payload
    fits = replace(made("ann", 10), size=len(payload))

    def judged(data: bytes, codec: Codec = Codec.INT8, most_norm: float = 100.0) -> Any:
        return judge_payload(data, fits, codec, EXPECTED, most_norm=most_norm, who=peer_of("ann"))

    assert judged(payload) == pytest.approx(vector, abs=0.01)
    for found, expected in (
        (judged(payload[:-1]), Why.SIZE),
        (judged(payload, Codec.INT4), Why.ENCODING),
        (judged(b"x" * len(payload)), Why.ENCODING),
        (judged(payload, most_norm=1.0), Why.NORM),
    ):
        assert isinstance(found, Refusal)
        assert (found.why, found.why.hostile) == (expected, True)
    assert not Why.STALE.hostile
    assert checks.MAX_STALENESS == 4


def test_vectors() -> None:
    whole = sign_delta(key_of("ann"), FULL)
    plain = signed("bob", 1)
    unsorted = replace(FULL, parents=FULL.parents[::-1])
    cases = [
        Case("delta", plain, record("bob", 1)),
        Case("delta-that-adds", whole, FULL),
        Case("another-signer", sign_record(key_of("eve"), DELTA_RECORD, encode(FULL))),
        Case("another-domain", sign_record(key_of("ann"), "advert", encode(FULL))),
        Case("parents-out-of-order", sign_record(key_of("ann"), DELTA_RECORD, encode(unsorted))),
        Case("truncated", plain[:-1]),
        Case("trailing", plain + b"\0"),
        Case("empty", b""),
    ]  # fmt: skip
    hold("delta", cases, open_delta)
