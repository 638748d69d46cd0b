"""What a network learns, and how: see SPEC.md."""
