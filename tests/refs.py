"""Files by CID and size, in short."""

from __future__ import annotations

from protocols.ids import Cid
from protocols.manifest.messages import FileRef


def ref(cid: Cid, size: int) -> FileRef:
    """A file to be fetched."""
    return FileRef(cid=cid, size=size)
