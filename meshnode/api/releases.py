"""The releases that a data folder's node knows, by the names that people use for them."""

from __future__ import annotations

from typing import Protocol

from meshnode.core.errors import ModelError
from meshnode.state import releases
from meshnode.state.port import Records
from protocols.errors import RemoteProtocolError
from protocols.ids import Cid
from protocols.manifest.codec import open_manifest
from protocols.manifest.messages import Manifest


class Blocks(Protocol):
    """Where manifests are."""

    def block(self, cid: Cid) -> bytes | None: ...


def known_releases(state: Records, store: Blocks) -> tuple[dict[Cid, tuple[Manifest, str]], dict[Cid, str]]:
    """Releases added here or served by this node: manifest CID -> (manifest, variant); and what is wrong with those
    whose manifest is damaged."""
    good: dict[Cid, tuple[Manifest, str]] = {}
    bad: dict[Cid, str] = {}
    for cid, variant in releases.known(state).items():
        block = store.block(cid)
        if block is None:
            continue
        try:
            good[cid] = (open_manifest(block), variant)
        except RemoteProtocolError as error:
            bad[cid] = str(error)
    return good, bad


def find_release(state: Records, store: Blocks, wanted: str, variant: str = "") -> tuple[Cid, Manifest, str]:
    """(manifest CID, manifest, variant) of the newest release with this CID, name, or name@version.

    variant: releases that have it go before those that have not.

    Raises ModelError, with the names that there are.
    """
    known, bad = known_releases(state, store)
    if wanted in bad:
        raise ModelError(f"The manifest {wanted} is damaged: {bad[Cid(wanted)]}. Add the model again.")
    found = [
        (cid, manifest, variant)
        for cid, (manifest, variant) in known.items()
        if wanted in (cid, manifest.name, f"{manifest.name}@{manifest.version}")
    ]
    if not found:
        begins = [entry for entry in known if known[entry][0].name.startswith(wanted) or entry.startswith(wanted)]
        if wanted and len({known[entry][0].name for entry in begins}) == 1:
            found = [(entry, *known[entry]) for entry in begins]
    if not found:
        names = ", ".join(sorted({m.name for m, _ in known.values()})) or "none"
        raise ModelError(f"This node has no model {wanted!r}; it has: {names}. Add one with: meshnode model add PATH")
    return max(found, key=lambda entry: (variant in entry[1].variants, entry[1].created_ms))


def check_variant(manifest: Manifest, variant: str) -> None:
    """Raises ModelError, with the variants that there are."""
    if variant not in manifest.variants:
        raise ModelError(f"{manifest.name} has no variant {variant}; it has {', '.join(manifest.variants)}.")


def check_servable(manifest: Manifest, variant: str) -> None:
    """Raises ModelError unless the network can serve this variant, with those that it can."""
    check_variant(manifest, variant)
    if variant not in manifest.servable:
        raise ModelError(
            f"The variant {variant} of {manifest.name} is for training and can't be served; choose "
            f"{' or '.join(manifest.servable)}."
        )
