"""The network record: its id and how it is made and opened."""

from __future__ import annotations

import base64
import hashlib
from typing import Final

from nacl.signing import SigningKey

from protocols.codec import decode, encode
from protocols.envelope import open_record, sign_record
from protocols.errors import RemoteProtocolError
from protocols.ids import public_key_of
from protocols.membership.messages import NETWORK, Network

_CONTEXT: Final = b"meshnode/network/1"
_ID_BYTES: Final = 15  # 24 characters of base32 without padding; founders are pinned beside it


def network_id(network: Network) -> str:
    """24 characters that name a network: a hash of its founders and nonce."""
    digest = hashlib.sha256(b"".join((_CONTEXT, network.nonce, *network.founders))).digest()
    return base64.b32encode(digest[:_ID_BYTES]).decode("ascii").lower()


def sign_network(founder: SigningKey, network: Network) -> bytes:
    """The signed record of a network that `founder` is a founder of."""
    return sign_record(founder, NETWORK, encode(network))


def open_network(data: bytes) -> Network:
    """The network of a signed record.

    Raises:
      RemoteProtocolError: badly encoded or signed, not signed by a founder, founders not sorted, no name.
    """
    opened = open_record(data, domain=NETWORK)
    network = decode(Network, opened.payload)
    if not network.founders or list(network.founders) != sorted(set(network.founders)):
        raise RemoteProtocolError("the founders of a network record are missing, repeated or not sorted")
    if public_key_of(opened.signer) not in network.founders:
        raise RemoteProtocolError(f"{opened.signer} signed a network record, but is none of its founders")
    if not network.name.strip() or not network.name.isprintable():
        raise RemoteProtocolError(f"{network.name!r} is no name for a network")
    return network
