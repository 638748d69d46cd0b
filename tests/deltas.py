"""Signed records of deltas, for the tests of several levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nacl.signing import SigningKey

from protocols.delta.frame import Frame, Target
from protocols.delta.messages import Codec, DeltaRecord, Made, sign_delta
from protocols.ids import DAG_CBOR, RAW, Cid, PeerId, cid_of, cid_to_bytes, peer_id_of

FRAME = Frame(
    base=cid_of(DAG_CBOR, b"a manifest"),
    rank=2,
    alpha=4,
    targets=(Target("q_proj", 6, 6), Target("v_proj", 6, 3)),
    first=1,
    last=3,
    seed=7,
)


def key_of(name: str) -> SigningKey:
    return SigningKey(name.encode().ljust(32, b"\0")[:32])


def peer_of(name: str) -> PeerId:
    return peer_id_of(bytes(key_of(name).verify_key))


def delta_cid(name: str, round_number: int, exchange: int = 0) -> Cid:
    """The CID of what a node made for a position, in tests where nobody looks into it."""
    return cid_of(RAW, f"{name} {round_number} {exchange}".encode())


def made(name: str, round_number: int, exchange: int = 0) -> Made:
    cid = cid_to_bytes(delta_cid(name, round_number, exchange))
    return Made(round=round_number, exchange=exchange, cid=cid, size=100)


def record(
    name: str, round_number: int, exchange: int = 0, *, parents: Sequence[Cid] = (), recent: int = 0, **fields: Any
) -> DeltaRecord:
    """What `name` says about its delta of a position; `recent`: how many rounds before it are named."""
    first = DeltaRecord(
        peer=peer_of(name),
        frame=cid_to_bytes(FRAME.cid),
        made=made(name, round_number, exchange),
        codec=Codec.INT8,
        whole=None,
        privacy=None,
        parents=tuple(sorted(map(cid_to_bytes, parents))),
        recent=tuple(made(name, round_number - k) for k in range(1, min(recent, round_number) + 1)),
    )
    return replace(first, **fields)


def signed(name: str, round_number: int, exchange: int = 0, **fields: Any) -> bytes:
    return sign_delta(key_of(name), record(name, round_number, exchange, **fields))
