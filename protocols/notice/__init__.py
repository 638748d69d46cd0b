"""What members tell everybody beside their adverts: see SPEC.md."""
