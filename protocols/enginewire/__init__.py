"""Node <-> engine child process over a socket pair. See SPEC.md."""
