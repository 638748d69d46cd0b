"""`meshnode model add CID`: a model that others hold, IPFS nodes too, by the CID of its manifest alone."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import TYPE_CHECKING, Final

from meshnode.cli.settings import client_of, folder_of, settings
from meshnode.core.errors import ConfigError, ModelError
from meshnode.core.paths import Paths

if TYPE_CHECKING:
    from protocols.ids import Cid

MAX_SHOWN: Final = 120  # characters
MANIFEST: Final = "a model is added by the CID of its manifest, which begins with bafyrei"
WHERE: Final = "(`meshnode model list` shows it where the model is)"
_OLD: Final = re.compile(r"Qm[1-9A-HJ-NP-Za-km-z]{44}")  # CIDv0
_ALIKE: Final = re.compile(r"Qm[1-9A-HJ-NP-Za-km-z]{20,60}|[Bb][Aa][Ff][KYky][A-Za-z0-9]{8,100}|bagu[a-z2-7]{20,100}")


def manifest_cid(source: str) -> Cid | None:
    """The CID that the source of `model add` is, with or without ipfs://; None for a path or a package.

    Raises ModelError when it is the CID of something that can't be a manifest, or is meant as a CID and is none.
    """
    from protocols.errors import RemoteProtocolError
    from protocols.ids import DAG_CBOR, Cid, cid_codec

    text = source.removeprefix("ipfs://").removeprefix("/ipfs/")
    if not (text != source or _ALIKE.fullmatch(text)) or os.path.lexists(source):
        return None
    try:
        codec = cid_codec(text)
    except RemoteProtocolError as error:
        raise ModelError(_no_cid(text[:MAX_SHOWN], str(error))) from error
    if codec != DAG_CBOR:
        raise ModelError(f"{text} is the CID of a file; {MANIFEST} {WHERE}.")
    return Cid(text)


def _no_cid(text: str, reason: str) -> str:
    """What is wrong with a text that is meant as a CID."""
    from protocols.errors import RemoteProtocolError
    from protocols.ids import cid_codec

    if _OLD.fullmatch(text):
        return f"{text} is the CID of a file (CIDv0); {MANIFEST} {WHERE}."
    try:
        cid_codec(text.lower())
    except RemoteProtocolError:
        return (
            f"{text} looks like a CID but is not a valid one: {reason.rstrip('.')}. Copy it again, whole; {MANIFEST} "
            f"and has 59 characters {WHERE}."
        )
    return f"{text} looks like a CID but is not a valid one here: write it in lower-case letters, {text.lower()}."


def add_by_cid(arguments: argparse.Namespace, cid: Cid) -> int:
    """Fetch the manifest, which the running node does if it is not here; then see `adopt`."""
    from meshnode.api.releases import check_servable
    from meshnode.cli.model import VARIANTS, adopt, check_may_publish, open_store, print_model
    from protocols.errors import RemoteProtocolError
    from protocols.manifest.codec import open_manifest

    if arguments.name or arguments.release_version:
        raise ConfigError("a model that is added by its CID keeps the name and version of its manifest")
    variants: list[str] = arguments.variant or [""]
    if len(variants) > 1:
        raise ConfigError("a model that is added by its CID is served in one variant; give --variant once, or not")
    variant = variants[0]
    if variant and variant not in VARIANTS:
        raise ConfigError(
            f"the variant {variant} can't be served; add the model in another one, then have this one here as well: "
            f"meshnode model pin NAME --variant {variant}"
        )
    if arguments.serve:
        check_may_publish(arguments)
    with open_store(arguments) as store:
        block = store.block(cid)
    if block is None:
        node = client_of(arguments)
        if not node.is_running():
            return _later(arguments, cid, variant)
        print(f"Looking for {cid}", file=sys.stderr)
        node.fetch_manifest(cid)
        with open_store(arguments) as store:
            block = store.block(cid)
    if block is None:
        raise ModelError(f"The manifest {cid} came and was removed again: content.quota leaves no room for it.")
    try:
        manifest = open_manifest(block)
    except RemoteProtocolError as error:
        raise ModelError(f"{cid} is not the manifest of a model: {error}") from error
    variant = variant or manifest.smallest_variant()
    check_servable(manifest, variant)
    with open_store(arguments) as store:
        missing = sum(ref.size for ref in manifest.files_of(variant) if store.path(ref.cid) is None)
    adopt(arguments, cid, manifest, variant, missing=missing)
    print_model(cid, manifest)
    return 0


def _later(arguments: argparse.Namespace, cid: Cid, variant: str) -> int:
    from meshnode.cli.model import check_may_publish
    from meshnode.state import releases
    from meshnode.state.database import Database

    folder = folder_of(arguments)
    check_may_publish(arguments)
    with Database(Paths(folder).state) as database:
        if releases.served(database) is not None and not arguments.serve:
            raise ConfigError(
                "this node does not run, so it can't fetch the model, and the network served another one when it ran "
                "last; start the node first (meshnode start), or say that this model is to replace it (--serve)"
            )
        releases.serve_later(database, cid, variant)
    print(f"The model {cid} is fetched and served as soon as this node starts.")
    content = settings(arguments).content
    if not (content.ipfs_peers or content.ipfs_api or content.gateways):
        print("It is asked for at other nodes of this network; name IPFS nodes that have it in content.ipfs_peers.")
    return 0
