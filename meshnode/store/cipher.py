"""Encryption at rest: AES-256 in counter mode (NIST SP 800-38A), one key per file.

Length-preserving and seekable, so that a block stays a range of its file. The counter never meets two plaintexts
under one key: a file's key is made from its CID, which names its bytes. Integrity needs no tag: whoever gets a block
hashes it. What stays readable on the disk are CIDs, sizes and manifests.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher as _Cipher
from cryptography.hazmat.primitives.ciphers import algorithms, modes

_AES_BYTES: Final = 16
_PURPOSE: Final = b"meshnode content at rest 1"


class Cipher:
    """Covers and uncovers pieces of files; the same call does both."""

    def __init__(self, secret: bytes, network_id: str) -> None:
        """`secret`: the node's key; with a passphrase on it, the files are worth nothing without that passphrase."""
        self._key = hmac.digest(secret, _PURPOSE + network_id.encode(), hashlib.sha256)

    def fingerprint(self) -> bytes:
        """8 bytes that tell this key from another and nothing else about it."""
        return hmac.digest(self._key, b"fingerprint", hashlib.sha256)[:8]

    def apply(self, name: bytes, data: bytes | bytearray | memoryview, offset: int) -> bytes:
        """The piece at `offset` (bytes) of the file with the binary CID `name`, covered or uncovered."""
        first, skipped = divmod(offset, _AES_BYTES)
        key = hmac.digest(self._key, name, hashlib.sha256)
        worker = _Cipher(algorithms.AES256(key), modes.CTR(first.to_bytes(_AES_BYTES, "big"))).encryptor()
        worker.update(bytes(skipped))
        return worker.update(data)
