"""The system's own service manager: files that have it run a node, and the commands that it takes."""
