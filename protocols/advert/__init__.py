"""Signed capability adverts and heads: see SPEC.md."""
