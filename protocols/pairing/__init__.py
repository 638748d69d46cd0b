"""A new device gets its ticket by six digits, read on one screen and typed on the other. See SPEC.md."""
