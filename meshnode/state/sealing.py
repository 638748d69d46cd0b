"""Rows that are kept encrypted with the node's key, as its model files are (`store/cipher.py`).

XSalsa20 and Poly1305 (NaCl's SecretBox), a random nonce for each row. A file has one key of its own, which lies in it
sealed with a key that comes from the node's: so the node's key opens it, and no row has to be written anew for that.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from nacl.exceptions import CryptoError
from nacl.secret import SecretBox

from meshnode.core.errors import ConfigError

KEY_BYTES: Final = 32
_PURPOSE: Final = b"meshnode samples at rest 1"


def samples_key(seed: bytes, network_id: str) -> bytes:
    """What seals the samples of this node. With a passphrase on its key, they are worth nothing without that."""
    return hmac.digest(seed, _PURPOSE + network_id.encode(), hashlib.sha256)


def seal(key: bytes, data: bytes) -> bytes:
    """40 bytes longer."""
    return bytes(SecretBox(key).encrypt(data))


def unseal(key: bytes, data: bytes, where: str) -> bytes:
    """Raises ConfigError when it was sealed with another key, or is damaged. `where`: names the file."""
    try:
        return bytes(SecretBox(key).decrypt(data))
    except (CryptoError, ValueError) as error:  # ValueError: too short
        raise ConfigError(
            f"{where} is encrypted with the key of another node or network, or damaged; put that key back, or move "
            "the file away, and the samples in it are lost"
        ) from error
