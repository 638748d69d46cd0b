"""A private IPFS network: every byte of a connection goes under one shared key, the first included.

libp2p specs, pnet/Private-Networks-PSK-V1-Spec: each side sends 24 random bytes, then everything in XSalsa20. The
key hides that there is a libp2p node and turns strangers away; who the peer is and that nothing was changed is
proven by Noise, inside. The library's own `libp2p.security.pnet` is Salsa20 with nonces of 8 bytes, which neither
Kubo nor anything else understands.
"""

from __future__ import annotations

import base64
import os
import struct
from pathlib import Path
from typing import Final

from Crypto.Cipher import Salsa20

from meshnode.core.errors import ConfigError
from protocols.errors import RemoteProtocolError

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 24
MAX_FILE_BYTES: Final = 1024
GREETING: Final = b"\x13/multistream/1.0.0\n"  # the first line of both sides

_HEADER: Final = b"/key/swarm/psk/1.0.0/"
_SIGMA: Final = struct.unpack("<4I", b"expand 32-byte k")
_COLUMNS: Final = ((0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11))
_ROWS: Final = ((0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14))
_TURNS: Final = ((1, 0, 3, 7), (2, 1, 0, 9), (3, 2, 1, 13), (0, 3, 2, 18))


def load_swarm_key(setting: str) -> bytes:
    """The key in the file that `network.swarm_key` names; empty when it names none.

    Raises ConfigError with what is wrong with the file.
    """
    if not setting:
        return b""
    path = Path(setting)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"network.swarm_key: can't read {path}: {error.strerror or error}") from error
    try:
        return parse_swarm_key(data)
    except ValueError as error:
        raise ConfigError(
            f"network.swarm_key: {path} is not the swarm.key of an IPFS network: {error}. Copy the file of a node of "
            "that network, byte by byte."
        ) from error


def parse_swarm_key(data: bytes) -> bytes:
    """The 32 bytes in the text of a swarm.key file: header, encoding (base16, base64 or bin), key, a line each.

    Raises ValueError with a clause.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
    header, _, rest = data.partition(b"\n")
    encoding, _, body = rest.partition(b"\n")
    if header.strip() != _HEADER:
        raise ValueError(f"its first line is not {_HEADER.decode()}")
    match encoding.strip():
        case b"/base16/":
            key = bytes.fromhex(body.strip().decode("ascii"))
        case b"/base64/":
            key = base64.b64decode(body.strip(), validate=True)
        case b"/bin/":
            key = body if len(body) == KEY_BYTES else body.removesuffix(b"\n")
        case _:
            raise ValueError("its second line is not /base16/, /base64/ or /bin/")
    if len(key) != KEY_BYTES:
        raise ValueError(f"its key has {len(key)} bytes, not {KEY_BYTES}")
    return key


class Cover:
    """Both directions of one connection under the key."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._nonce = b""  # of the other side, as far as it has come
        self._sealing: Salsa20.Salsa20Cipher | None = None
        self._opening: Salsa20.Salsa20Cipher | None = None
        self._expected = GREETING  # what is still to come of it

    def seal(self, data: bytes) -> bytes:
        """What goes over the wire for the next bytes of ours."""
        if self._sealing is not None:
            return self._sealing.encrypt(data)
        nonce = os.urandom(NONCE_BYTES)
        self._sealing = xsalsa20(self._key, nonce)
        return nonce + self._sealing.encrypt(data)

    def open(self, data: bytes) -> bytes:
        """The bytes that came over the wire; none as long as the nonce is not complete.

        Raises RemoteProtocolError when they don't begin as every libp2p connection does: without that, a peer with
        another key would leave both sides waiting for the end of a message that never was one.
        """
        plain = self._opened(data)
        if self._expected:
            begun = plain[: len(self._expected)]
            if not self._expected.startswith(begun):
                raise RemoteProtocolError("what it sends makes no sense under our swarm key")
            self._expected = self._expected[len(begun) :]
        return plain

    def _opened(self, data: bytes) -> bytes:
        if self._opening is not None:
            return self._opening.decrypt(data)
        missing = NONCE_BYTES - len(self._nonce)
        self._nonce += data[:missing]
        if len(self._nonce) < NONCE_BYTES:
            return b""
        self._opening = xsalsa20(self._key, self._nonce)
        return self._opening.decrypt(data[missing:])


def xsalsa20(key: bytes, nonce: bytes) -> Salsa20.Salsa20Cipher:
    """The stream cipher of "Extending the Salsa20 nonce" (Bernstein, 2011): 32 bytes of key, 24 of nonce."""
    return Salsa20.new(key=hsalsa20(key, nonce[:16]), nonce=nonce[16:])


def hsalsa20(key: bytes, nonce: bytes) -> bytes:
    """A key of 32 bytes from one and 16 bytes of nonce: the rounds of Salsa20 without the last addition."""
    k, n = struct.unpack("<8I", key), struct.unpack("<4I", nonce)
    x = [_SIGMA[0], *k[:4], _SIGMA[1], *n, _SIGMA[2], *k[4:], _SIGMA[3]]
    for _ in range(10):
        for quarters in (_COLUMNS, _ROWS):
            for quarter in quarters:
                for into, left, right, bits in _TURNS:
                    total = (x[quarter[left]] + x[quarter[right]]) & 0xFFFFFFFF
                    x[quarter[into]] ^= (total << bits | total >> (32 - bits)) & 0xFFFFFFFF
    return struct.pack("<8I", *(x[i] for i in (0, 5, 10, 15, 6, 7, 8, 9)))
