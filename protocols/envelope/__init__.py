"""Signed records: see SPEC.md."""

from protocols.envelope.record import MAX_RECORD_BYTES, ClaimedRecord, Opened, open_record, sign_record

__all__ = ["MAX_RECORD_BYTES", "ClaimedRecord", "Opened", "open_record", "sign_record"]
