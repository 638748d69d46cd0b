"""The stage data plane: see SPEC.md."""
