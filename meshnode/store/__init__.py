"""Content-addressed files on disk and their port."""
