"""Who made two deltas for one position is shown to everybody, by those who saw both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from meshnode.policy.reputation import BAN_S
from meshnode.services.learning.exchange import Exchange
from meshnode.services.learning.ground import Ground
from meshnode.services.learning.report import Report
from protocols.codec import encode
from protocols.delta.checks import Expected
from protocols.delta.evidence import MAX_PROOFS, Evidence, read_evidence, write_evidence
from protocols.delta.messages import MAX_RECORD_BYTES, Codec, Equivocation, sign_delta
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, PeerId, cid_of, cid_to_bytes
from protocols.notice.messages import DELTA, EVIDENCE, MAX_CONTENT_BYTES
from tests.deltas import FRAME, key_of, made, peer_of, record, signed


def lie(name: str, number: int, **fields: Any) -> bytes:
    """Another delta for a position than that of `signed`."""
    return sign_delta(key_of(name), replace(record(name, number, **fields), made=made(f"{name} lies", number)))


def proof_of(name: str, number: int, **fields: Any) -> Equivocation:
    return Equivocation(first=signed(name, number, **fields), second=lie(name, number, **fields))


# ---------------------------------------------------------------- the message


def test_evidence_proves_itself_and_the_newest_stays() -> None:
    proofs = [proof_of("eve", number) for number in range(MAX_PROOFS + 2)]
    found = read_evidence(write_evidence(proofs))
    assert [proof.position.round for proof, _ in found] == [2, 3, 4]
    assert {(proof.peer, proof.frame) for proof, _ in found} == {(peer_of("eve"), FRAME.cid)}
    assert [records for _, records in found] == proofs[2:]


def test_the_largest_evidence_fits_into_a_notice() -> None:
    full = Equivocation(first=bytes(MAX_RECORD_BYTES), second=bytes(MAX_RECORD_BYTES))
    assert len(write_evidence([full] * MAX_PROOFS)) <= MAX_CONTENT_BYTES


def test_what_is_no_evidence() -> None:
    honest = Equivocation(first=signed("ann", 1), second=signed("ann", 2))
    for content in (b"", b"x", write_evidence([honest]), write_evidence([proof_of("eve", 1)])[:-1]):
        with pytest.raises(RemoteProtocolError):
            read_evidence(content)
    with pytest.raises(RemoteProtocolError):
        read_evidence(encode(Evidence(proofs=(replace(proof_of("eve", 1), first=lie("bob", 1)),))))


# ---------------------------------------------------------------- who tells whom


class Board:
    """Notices of all, as one node sees and gives them."""

    def __init__(self, us: PeerId) -> None:
        self.us = us
        self.kinds: dict[str, dict[PeerId, bytes]] = {DELTA: {}, EVIDENCE: {}}

    def all(self, kind: str) -> Mapping[PeerId, bytes]:
        return self.kinds[kind]

    def give(self, kind: str, content: bytes) -> None:
        self.kinds[kind][self.us] = content


class Everybody:
    def has(self, _peer: PeerId, _role: str) -> bool:
        return True


def node(name: str, folder: Path, board: Board | None = None) -> tuple[Exchange, Board, Report]:
    board, report = board or Board(peer_of(name)), Report()
    parts: Any = dict.fromkeys(("signer", "content", "store", "workers", "wall"))
    ground = Ground(**{**parts, "us": board.us, "notices": board, "rights": Everybody()})
    expected = Expected(frame=FRAME.cid, parameters=FRAME.parameters, base=None, round=2, adds=False)
    return Exchange(ground, lambda: expected, Codec.INT8, report, folder), board, report


async def test_who_saw_both_tells_who_saw_one(tmp_path: Path) -> None:
    ann, ann_sees, ann_report = node("ann", tmp_path)
    bob, bob_sees, bob_report = node("bob", tmp_path)
    ann_sees.kinds[DELTA][peer_of("eve")] = signed("eve", 2)
    bob_sees.kinds[DELTA][peer_of("eve")] = lie("eve", 2)
    for exchange in (ann, bob):
        fresh, caught = exchange.look()
        assert ([r.peer for r in fresh], caught) == ([peer_of("eve")], [])
    ann_sees.kinds[DELTA][peer_of("eve")] = lie("eve", 2)
    assert ann.look() == ([], [peer_of("eve")])
    bob_sees.kinds[EVIDENCE] = dict(ann_sees.kinds[EVIDENCE])
    assert bob.look() == ([], [peer_of("eve")])
    assert bob.look() == ([], []), "once"
    for report in (ann_report, bob_report):
        assert report.refused == {"equivocated": 1}, report.refusals


async def test_who_was_caught_is_left_out_for_a_day(tmp_path: Path, autojump_clock: trio.abc.Clock) -> None:
    ann, board, _ = node("ann", tmp_path)
    board.kinds[EVIDENCE][peer_of("bob")] = write_evidence([proof_of("eve", 1)])
    assert ann.look() == ([], [peer_of("eve")])
    board.kinds[DELTA][peer_of("eve")] = signed("eve", 2)
    assert ann.look() == ([], [])
    await trio.sleep(BAN_S + 1)
    board.kinds[DELTA][peer_of("eve")] = signed("eve", 3)
    fresh, _ = ann.look()
    assert [one.made.round for one in fresh] == [3]


async def test_a_restart_forgets_nothing_that_was_told(tmp_path: Path) -> None:
    ann, board, _ = node("ann", tmp_path)
    for data in (signed("eve", 2), lie("eve", 2)):
        board.kinds[DELTA][peer_of("eve")] = data
        ann.look()
    again, _, report = node("ann", tmp_path, board)
    assert again.look() == ([], [peer_of("eve")])
    for data in (signed("mallory", 2), lie("mallory", 2)):
        board.kinds[DELTA][peer_of("mallory")] = data
        again.look()
    assert {proof.peer for proof, _ in read_evidence(board.kinds[EVIDENCE][board.us])} == {
        peer_of("eve"),
        peer_of("mallory"),
    }
    assert report.refused["equivocated"] == 2


async def test_accusing_without_proof_counts_against_the_accuser(tmp_path: Path) -> None:
    ann, board, report = node("ann", tmp_path)
    honest = Equivocation(first=signed("bob", 1), second=signed("bob", 2))
    board.kinds[EVIDENCE][peer_of("eve")] = write_evidence([honest])
    assert ann.look() == ([], [])
    assert "without proof" in report.refusals[0]
    assert ann.reputations[peer_of("eve")].score < 0.6
    assert peer_of("bob") not in ann.reputations


async def test_proofs_of_other_frames_are_left_alone(tmp_path: Path) -> None:
    ann, board, _ = node("ann", tmp_path)
    foreign = cid_to_bytes(cid_of(DAG_CBOR, b"another frame"))
    board.kinds[EVIDENCE][peer_of("bob")] = write_evidence([proof_of("eve", 1, frame=foreign)])
    assert ann.look() == ([], [])


async def test_a_proof_against_ourselves_is_told_to_the_owner(tmp_path: Path) -> None:
    ann, board, report = node("ann", tmp_path)
    board.kinds[EVIDENCE][peer_of("bob")] = write_evidence([proof_of("ann", 1)])
    assert ann.look() == ([], [])
    assert "as if two ran with its key" in report.refusals[0]
