"""Keys, adverts and announcements for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nacl.signing import SigningKey

from meshnode.core.signal import Changes
from protocols.advert.messages import ADVERT, HEAD, Advert, Announcement
from protocols.codec import encode
from protocols.envelope import sign_record
from protocols.ids import DAG_CBOR, RAW, Cid, PeerId, cid_of, peer_id_of

MANIFEST = cid_of(DAG_CBOR, b"a manifest")
OTHER_MANIFEST = cid_of(DAG_CBOR, b"another manifest")


def file_cid(name: str) -> Cid:
    return cid_of(RAW, name.encode())


NOW_MS = 1_700_000_000_000  # when tests happen


def key_of(number: int) -> SigningKey:
    return SigningKey(number.to_bytes(32, "big"))


def peer_of(number: int) -> PeerId:
    return peer_id_of(bytes(key_of(number).verify_key))


def advert_of(number: int, **fields: Any) -> Advert:
    advert = Advert(
        peer=peer_of(number),
        incarnation=1,
        sequence=1,
        name=f"node-{number}",
        addresses=(),
        serving=None,
    )
    return replace(advert, **fields)


def advert_named(name: str, **fields: Any) -> Advert:
    """For policies, which look at no keys: the name stands for the peer id."""
    return advert_of(1, peer=name, name=name, **fields)


def announcement_of(number: int, **fields: Any) -> Announcement:
    announcement = Announcement(
        peer=peer_of(number),
        incarnation=1,
        sequence=1,
        created_ms=NOW_MS,
        name="smollm2-135m-instruct",
        version="v1.0.0-0",
        manifest=MANIFEST,
        variant="int4",
    )
    return replace(announcement, **fields)


def signed(number: int, body: Advert | Announcement) -> bytes:
    """The record of an advert or head, signed with the key of this number."""
    return sign_record(key_of(number), ADVERT if isinstance(body, Advert) else HEAD, encode(body))


class Known:
    """Stands for the directory: the adverts that a node sees."""

    def __init__(self) -> None:
        self.changes = Changes()
        self._adverts: dict[PeerId, Advert] = {}

    def live(self) -> Mapping[PeerId, Advert]:
        return self._adverts

    def set(self, addresses: Mapping[PeerId, Sequence[str]]) -> None:
        """From now on these peers, and no others, say where they listen."""
        self._adverts = {peer: replace(advert_of(1), peer=peer, addresses=tuple(a)) for peer, a in addresses.items()}
        self.changes.notify()
