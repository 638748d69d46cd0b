"""Which releases this node has published or chosen, and which of them the network is still to be told of."""

from __future__ import annotations

from typing import Final

from meshnode.state.port import Records
from protocols.advert.messages import HEAD, Announcement
from protocols.codec import decode
from protocols.envelope import open_record
from protocols.ids import Cid, PeerId

_KNOWN: Final = "release"
_WAITING: Final = "release.waiting"
_SERVED: Final = "release.served"


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


def take_over(state: Records, before: PeerId) -> bool:
    """This node had another key, whose word about the served release counts no more: it is said again at the next
    start. Whether there was one."""
    data = state.record(HEAD, before)
    if data is None:
        return False
    state.remove_record(HEAD, before)
    said = decode(Announcement, open_record(data, domain=HEAD).payload)
    if not said.retired and waiting(state) is None:
        serve_later(state, Cid(said.manifest), said.variant)
    return not said.retired


def wait_no_longer(state: Records) -> None:
    """It was announced, another one was, or it can't be."""
    for cid in state.records(_WAITING):
        state.remove_record(_WAITING, cid)


def set_served(state: Records, publisher: str, manifest: Cid, variant: str) -> None:
    """This release is served, by the word of this publisher."""
    for other in state.records(_SERVED):
        if other != publisher:
            state.remove_record(_SERVED, other)
    state.put_record(_SERVED, publisher, f"{manifest} {variant}".encode())


def served(state: Records) -> tuple[str, Cid, str] | None:
    """(publisher, manifest, variant) of what was served last."""
    for publisher, data in state.records(_SERVED).items():
        manifest, _, variant = data.decode().partition(" ")
        return publisher, Cid(manifest), variant
    return None
