"""Withdrawals that outlive a restart: kept among the node's signed records."""

from __future__ import annotations

from contextlib import suppress

from meshnode.state.port import Records
from protocols.codec import decode
from protocols.envelope import open_record
from protocols.membership import Trust, Untrusted
from protocols.membership.messages import WITHDRAWAL, Withdrawal


def keep_withdrawal(records: Records, data: bytes) -> None:
    """Keep a withdrawal that a `Trust` has accepted: one per subject and signer."""
    opened = open_record(data, domain=WITHDRAWAL)
    subject = decode(Withdrawal, opened.payload).peer
    records.put_record(WITHDRAWAL, f"{subject}/{opened.signer}", data)


def restore_withdrawals(trust: Trust, records: Records, wall_ms: int) -> bool:
    """Teach `trust` the withdrawals kept so far; whether there was something new."""
    new = False
    for data in records.records(WITHDRAWAL).values():
        with suppress(Untrusted):  # kept by an earlier version, or dated by a clock that was wrong
            new |= trust.withdraw(data, wall_ms) is not None
    return new
