"""Questions to a model that a member's own server runs. See SPEC.md."""
