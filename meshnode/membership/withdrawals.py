"""What was taken from members and their keys, and outlives a restart: kept among the node's signed records."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from meshnode.state.port import Records
from protocols.codec import decode
from protocols.envelope import open_record
from protocols.ids import PeerId
from protocols.membership import Trust, Untrusted
from protocols.membership.messages import MEMBER, SUCCESSION, WITHDRAWAL, Withdrawal


def keep_withdrawal(records: Records, data: bytes) -> None:
    """Keep a withdrawal that a `Trust` has accepted: one per subject and signer."""
    opened = open_record(data, domain=WITHDRAWAL)
    subject = decode(Withdrawal, opened.payload).peer
    records.put_record(WITHDRAWAL, f"{subject}/{opened.signer}", data)


def keep_successions(trust: Trust, records: Records, chain: Iterable[bytes]) -> bool:
    """Teach `trust` which keys a chain that holds has replaced, and keep that; whether there was something new."""
    new = trust.succeed(chain)
    for old, data in new.items():
        records.put_record(SUCCESSION, old, data)
        records.remove_record(MEMBER, old)
    return bool(new)


def successions(records: Records) -> dict[PeerId, bytes]:
    """The records of keys that were replaced, by the old key's peer id."""
    return {PeerId(old): data for old, data in records.records(SUCCESSION).items()}


def restore_withdrawals(trust: Trust, records: Records, wall_ms: int) -> bool:
    """Teach `trust` the withdrawals and new keys kept so far; whether there was a new withdrawal."""
    trust.succeed(successions(records).values())
    new = False
    for data in records.records(WITHDRAWAL).values():
        with suppress(Untrusted):  # kept by an earlier version, or dated by a clock that was wrong
            new |= trust.withdraw(data, wall_ms) is not None
    return new
