"""What every node checks in an advert or an announcement before it believes it: SPEC.md, section Validation.

Everything that a receiver computes with later is checked here, so that nobody else has to.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from protocols.advert.messages import (
    DRAINING,
    INTENT,
    LOADING,
    SERVING,
    STATES,
    Advert,
    Announcement,
    Holding,
    Loss,
    Serving,
    Span,
)
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, DAG_PB, RAW, PeerId, cid_codec, public_key_of
from protocols.notice.messages import Notice

MAX_ADDRESS: Final = 256  # characters of a multiaddr
MAX_AHEAD_MS: Final = (
    600_000  # how far ahead of our clock an announcement may be dated: as far as members' clocks differ
)
MAX_SEQUENCE: Final = 1 << 32  # of announcements: nobody makes as many, and there is always room for one more

_WORD: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_VARIANT: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_VERSION: Final = re.compile(r"v(?:0|[1-9][0-9]*)(?:\.(?:0|[1-9][0-9]*)){2}(?:-(?:0|[1-9][0-9]*))?")
_ADDRESS: Final = re.compile(r"/[a-z0-9-]+(?:/[^/\s]+)+")  # some transports have no value, like /quic-v1
_IP: Final = re.compile(r"/ip([46])/([^/]+)(?:/|$)")
_PORT: Final = re.compile(r"/(?:tcp|udp)(?:/([^/]*)|$)")
_CID_STARTS: Final = tuple(bytes((1, codec, 0x12, 32)) for codec in (RAW, DAG_PB, DAG_CBOR))


class Early(RemoteProtocolError):
    """An announcement or a notice is dated in the future: by the receiver's clock it is not to be believed yet."""


def check_date(said: Announcement | Notice, wall_ms: int) -> None:
    """Raise Early unless it may have been written by `wall_ms` (UTC milliseconds)."""
    ahead = max(said.created_ms if isinstance(said, Announcement) else 0, said.incarnation) - wall_ms
    if ahead > MAX_AHEAD_MS:
        what = "announcement" if isinstance(said, Announcement) else said.kind
        raise Early(
            f"the {what} of {said.peer} is dated {ahead // 60_000} min ahead of the clock here; "
            f"{MAX_AHEAD_MS // 60_000} are allowed"
        )


def check_advert(advert: Advert, signer: PeerId) -> None:
    """Raise RemoteProtocolError unless the advert is the signer's own and everything in it can be used."""
    if advert.peer != signer:
        raise RemoteProtocolError(f"{signer} signed an advert of {advert.peer}; a node speaks for itself alone")
    if not advert.incarnation:
        raise RemoteProtocolError(f"the advert of {signer} has no incarnation")
    if not advert.name.isprintable() or not advert.trouble.isprintable():
        raise RemoteProtocolError(f"the advert of {signer} has a name or a trouble that can't be printed")
    for word in advert.tags:
        if not _WORD.fullmatch(word):
            raise RemoteProtocolError(f"the advert of {signer} has {word[:40]!r} among its tags")
    for address in advert.addresses:
        check_address(address, signer)
    if advert.serving is not None:
        _check_serving(advert.serving, signer)
    manifests = [holding.manifest for holding in advert.holdings]
    if len(set(manifests)) != len(manifests):
        raise RemoteProtocolError(f"the advert of {signer} names a manifest twice among its holdings")
    for holding in advert.holdings:
        _check_holding(holding, signer)
    others = [trip.peer for trip in advert.round_trips]
    if len(set(others)) != len(others) or signer in others:
        raise RemoteProtocolError(f"the advert of {signer} has a round trip to itself, or two to the same peer")
    for other in others:
        public_key_of(other)


def check_loss(loss: Loss, signer: PeerId) -> None:
    """Raise RemoteProtocolError unless it is the signer's own and about somebody else."""
    if loss.peer != signer:
        raise RemoteProtocolError(f"{signer} signed a loss that {loss.peer} saw; a witness speaks for itself alone")
    if loss.lost == signer:
        raise RemoteProtocolError(f"{signer} says that it has lost itself")
    public_key_of(loss.lost)


def check_announcement(announcement: Announcement, signer: PeerId) -> None:
    """Raise RemoteProtocolError unless it is the signer's own and names a release."""
    if announcement.peer != signer:
        raise RemoteProtocolError(
            f"{signer} signed an announcement of {announcement.peer}; a publisher speaks for itself alone"
        )
    if not announcement.incarnation or not announcement.created_ms:
        raise RemoteProtocolError(f"the announcement of {signer} has no incarnation or no date")
    if announcement.sequence > MAX_SEQUENCE:
        raise RemoteProtocolError(f"the announcement of {signer} has a sequence number above {MAX_SEQUENCE}")
    if not _NAME.fullmatch(announcement.name):
        raise RemoteProtocolError(
            f"{announcement.name!r} is no model name (lower case letters, digits, dots, dashes)"
        )
    if not _VERSION.fullmatch(announcement.version):
        raise RemoteProtocolError(f"{announcement.version!r} is no version like v1.0.0-0")
    _check_release(announcement.manifest, announcement.variant, signer)


def check_address(address: str, peer: PeerId) -> None:
    """Raise RemoteProtocolError unless this is a multiaddr, and of `peer` if it names one.

    Transports that we don't know are allowed: who advertises a new one must not vanish for older peers.
    """
    if len(address) > MAX_ADDRESS or not address.isascii() or not _ADDRESS.fullmatch(address):
        raise RemoteProtocolError(f"{address[:80]!r} is no address like /ip4/192.0.2.1/tcp/4331/p2p/12D3KooW...")
    for version, ip in _IP.findall(address):
        try:
            right = ipaddress.ip_address(ip).version == int(version)
        except ValueError:
            right = False
        if not right:
            raise RemoteProtocolError(f"{address[:80]!r} holds no IPv{version} address")
    for port in _PORT.findall(address):
        if not port.isdigit() or len(port) > 5 or not 0 < int(port) < 65536:
            raise RemoteProtocolError(f"{address[:80]!r} holds no port from 1 to 65535")
    owner = address.rpartition("/p2p/")
    if owner[1] and owner[2] != peer:
        raise RemoteProtocolError(f"{address[:120]!r} is an address of another peer than {peer}")


def _check_serving(serving: Serving, signer: PeerId) -> None:
    if serving.state not in STATES:
        raise RemoteProtocolError(f"{signer} is in the state {serving.state!r}; there are {', '.join(STATES)}")
    if serving.span is None and serving.state in (SERVING, DRAINING):
        raise RemoteProtocolError(f"{signer} is {serving.state}, but names no span")
    if serving.target is None and serving.state in (INTENT, LOADING):
        raise RemoteProtocolError(f"{signer} is in the state {serving.state}, but names no target")
    for span in (serving.span, serving.target):
        if span is not None:
            _check_span(span, signer)


def _check_span(span: Span, signer: PeerId) -> None:
    if span.first >= span.last:
        raise RemoteProtocolError(f"the span of {signer} is empty: layers {span.first} to {span.last}")
    _check_release(span.manifest, span.variant, signer)


def _check_release(manifest: str, variant: str, signer: PeerId) -> None:
    if cid_codec(manifest) != DAG_CBOR:
        raise RemoteProtocolError(f"{signer} names {manifest} as a manifest, which is no dag-cbor block")
    if not _VARIANT.fullmatch(variant):
        raise RemoteProtocolError(f"{signer} names the variant {variant!r}, which no model can have")


def _check_holding(holding: Holding, signer: PeerId) -> None:
    if cid_codec(holding.manifest) != DAG_CBOR:
        raise RemoteProtocolError(f"{signer} names {holding.manifest} as a manifest, which is no dag-cbor block")
    before = b""
    for cid in holding.cids:
        if len(cid) != 36 or not cid.startswith(_CID_STARTS) or cid <= before:
            raise RemoteProtocolError(f"{signer} lists a wrong CID among its holdings, or not in ascending order")
        before = cid
