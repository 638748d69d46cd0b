"""Bitswap 1.2: asking peers for blocks by CID and answering them; see SPEC.md."""
