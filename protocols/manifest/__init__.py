"""Signed descriptions of a model release: see SPEC.md."""
