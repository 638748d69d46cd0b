"""UnixFS files as balanced trees of content-addressed blocks; see SPEC.md."""
