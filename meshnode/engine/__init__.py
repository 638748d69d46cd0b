"""The engine port, its child process, and what runs in it."""
