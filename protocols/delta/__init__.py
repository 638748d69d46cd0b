"""What nodes learn from each other: frames, deltas, their records and their history. See SPEC.md."""
