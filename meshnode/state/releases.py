"""Which releases this node has published or chosen, and which of them the network is still to be told of."""

from __future__ import annotations

from typing import Final

from meshnode.state.port import Records
from protocols.ids import Cid

_KNOWN: Final = "release"
_WAITING: Final = "release.waiting"


def remember(state: Records, manifest: Cid, variant: str) -> None:
    """A release lies in this node's store; `variant` is the one that it is served in."""
    state.put_record(_KNOWN, manifest, variant.encode())


def known(state: Records) -> dict[Cid, str]:
    """Manifest CID -> variant of every release that was remembered."""
    return {Cid(cid): variant.decode() for cid, variant in state.records(_KNOWN).items()}


def forget(state: Records, manifest: Cid) -> None:
    """The release is no longer here."""
    state.remove_record(_KNOWN, manifest)
    state.remove_record(_WAITING, manifest)


def serve_later(state: Records, manifest: Cid, variant: str) -> None:
    """No node runs on this folder: the next one that starts announces the release. Replaces an earlier wish.

    variant: empty for the smallest one, when the manifest is not here yet.
    """
    wait_no_longer(state)
    state.put_record(_WAITING, manifest, variant.encode())


def waiting(state: Records) -> tuple[Cid, str] | None:
    """The release that is to be announced, if one waits."""
    for cid, variant in state.records(_WAITING).items():
        return Cid(cid), variant.decode()
    return None


def wait_no_longer(state: Records) -> None:
    """It was announced, another one was, or it can't be."""
    for cid in state.records(_WAITING):
        state.remove_record(_WAITING, cid)
