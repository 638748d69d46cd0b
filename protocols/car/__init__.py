"""CAR files, version 1: blocks one after the other in a file; see SPEC.md."""
