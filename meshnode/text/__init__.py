"""Text in, token ids out, and back: only the asking node does this."""
