"""Finding members on the local network: see SPEC.md."""
