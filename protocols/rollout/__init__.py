"""Releases of what was learned, without a coordinator: see SPEC.md."""
