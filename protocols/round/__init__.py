"""With whom a node exchanges adapters, and when it goes on without them. See SPEC.md."""
