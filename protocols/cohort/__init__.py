"""The mean of a few adapters, none of which anybody sees. See SPEC.md."""
