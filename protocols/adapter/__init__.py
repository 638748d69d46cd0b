"""What an adapter consists of that is served: a block that names a file for each of its layers. See SPEC.md."""
