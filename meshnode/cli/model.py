"""`meshnode model`: publish models and look at them. Works with and without a running node."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from meshnode.cli import model_car, model_cid, model_keep
from meshnode.cli.main import add_data
from meshnode.cli.settings import ask_passphrase, client_of, folder_of, settings
from meshnode.core.errors import ConfigError, ModelError
from meshnode.core.paths import PUBLISH_PREFIX, Paths
from meshnode.core.sizes import format_size

if TYPE_CHECKING:
    from meshnode.store.blob_store import BlobStore
    from meshnode.store.cipher import Cipher
    from protocols.ids import Cid
    from protocols.manifest.messages import Manifest

VARIANTS: Final = ("int4", "int8", "fp32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser(
        "add", help="publish a Hugging Face folder, a GGUF file or example:smollm2; or fetch a CID"
    )
    add.add_argument("source", metavar="PATH_OR_PACKAGE_OR_CID")
    add.add_argument("--variant", action="append", choices=VARIANTS, help="precision; repeatable (default int4)")
    add.add_argument("--name", help="lower case, digits, dots and dashes (default: from the source)")
    add.add_argument("--release-version", metavar="vMAJOR.MINOR.PATCH-ADAPTER", help="default v1.0.0-0")
    add_data(add)
    for name, text in (
        ("show", "what a model is made of, and how good its variants are"),
        ("verify", "read every file again and compare it with its CID"),
        ("serve", "have the network serve this model"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("model", metavar="NAME_OR_CID")
        if name == "serve":
            action.add_argument("--variant", choices=VARIANTS)
        if name == "show":
            action.add_argument("--json", action="store_true")
        add_data(action)
    add_data(actions.add_parser("list", help="models that this node knows"))
    model_keep.add_actions(actions)
    model_car.add_actions(actions)


def run(arguments: argparse.Namespace) -> int:
    actions = {"add": _add, "list": _list, "show": _show, "verify": _verify, "serve": _serve}
    actions |= model_keep.ACTIONS | model_car.ACTIONS
    return actions[arguments.action](arguments)


# ---------------------------------------------------------------- publishing


def _add(arguments: argparse.Namespace) -> int:
    """Publish into the node's store, sign, and have the network serve the first variant; or take what a CID names."""
    wanted = model_cid.manifest_cid(arguments.source)
    if wanted is not None:
        return model_cid.add_by_cid(arguments, wanted)

    from meshnode.core.clock import wall_ms
    from meshnode.membership.identity import Identity
    from meshnode.publisher.release import FIRST_VERSION, release, run_publisher
    from meshnode.store.os_files import locked, remove_abandoned
    from protocols.errors import LocalProtocolError
    from protocols.manifest.codec import check_release

    variants = tuple(dict.fromkeys(arguments.variant or ["int4"]))
    version = arguments.release_version or FIRST_VERSION
    folder = folder_of(arguments)
    paths = Paths(folder)
    identity = Identity.load(folder, ask_passphrase)
    try:
        check_release(arguments.name, version)  # not after half a minute of publishing
    except LocalProtocolError as error:
        raise ConfigError(str(error)) from error
    remove_abandoned(paths.cache, PUBLISH_PREFIX)
    with (
        open_store(arguments, adds=True) as store,
        tempfile.TemporaryDirectory(dir=paths.cache, prefix=PUBLISH_PREFIX) as out,
        locked(Path(out)),
    ):
        run_publisher(arguments.source, Path(out), variants, StepProgress())
        cid, manifest = release(
            Path(out),
            store,
            identity.signing_key,
            created_ms=wall_ms(),
            publisher=identity.peer_id,
            name=arguments.name,
            version=version,
        )
    adopt(arguments, cid, manifest, variants[0])
    print_model(cid, manifest)
    return 0


class StepProgress:
    """One line that is overwritten, on a terminal; one line a step elsewhere."""

    def __init__(self) -> None:
        self._step = ""

    def __call__(self, step: str, variant: str, done: int, total: int) -> None:
        label = f"{step} {variant}".strip()
        if sys.stderr.isatty():
            share = 100 * done // max(1, total)
            bar = "#" * (share // 5)
            print(f"\r{label:<18}[{bar:<20}] {share:3d} %", end="\n" if done >= total else "", file=sys.stderr)
        elif label != self._step:
            print(label, file=sys.stderr)
        self._step = label


def adopt(arguments: argparse.Namespace, cid: Cid, manifest: Manifest, variant: str) -> None:
    """Remember a release whose manifest is in the store, and have the network serve it."""
    from meshnode.state import releases
    from meshnode.state.database import Database

    node = client_of(arguments)
    running = node.is_running()
    with Database(Paths(node.folder).state) as database:
        releases.remember(database, cid, variant)
        if not running:
            releases.serve_later(database, cid, variant)
    if running:
        node.serve(cid, variant=variant)
        print(f"The network now serves {manifest.name} {manifest.version} in {variant}.")
    else:
        print(f"{manifest.name} {manifest.version} is served in {variant} as soon as this node starts.")


# ---------------------------------------------------------------- looking


@contextmanager
def open_store(arguments: argparse.Namespace, *, adds: bool = False) -> Iterator[BlobStore]:
    """The content folder of this node, which a running node may use at the same time.

    adds: files will be added; where they are to be encrypted, that begins with the first, not with the next start.
    """
    from meshnode.core import log
    from meshnode.store import open as opening
    from meshnode.store.encryption import is_sealed

    log.set_up(level="error", format="console")  # what the store notices, the command says in its own words
    config = settings(arguments)
    config.paths.create()
    content, folder = config.content, config.paths.content
    begins = adds and content.encrypt and not is_sealed(folder) and not client_of(arguments).is_running()
    key = partial(_cipher, config.paths.folder)
    with opening.open_store(folder, content.quota, key, encrypt=True if begins else None) as store:
        yield store


def _cipher(folder: Path) -> Cipher:
    """What the files of this node are encrypted with; asks for the passphrase of its key."""
    from meshnode.membership.identity import Identity
    from meshnode.membership.network import load_network
    from meshnode.store.cipher import Cipher

    return Cipher(Identity.load(folder, ask_passphrase).seed, load_network(folder).network_id)


def found(arguments: argparse.Namespace, store: BlobStore) -> tuple[Cid, Manifest, str]:
    """The release that the command names: see `find_release`."""
    from meshnode.api.releases import find_release
    from meshnode.state.database import Database

    with Database(Paths(folder_of(arguments)).state) as database:
        return find_release(database, store, arguments.model)


def known_here(
    arguments: argparse.Namespace, store: BlobStore
) -> tuple[dict[Cid, tuple[Manifest, str]], dict[Cid, str]]:
    """Every release of this node: see `known_releases`."""
    from meshnode.api.releases import known_releases
    from meshnode.state.database import Database

    with Database(Paths(folder_of(arguments)).state) as database:
        return known_releases(database, store)


def _list(arguments: argparse.Namespace) -> int:
    with open_store(arguments) as store:
        known, bad = known_here(arguments, store)
        pinned = {cid for cid, files in store.pins().items() if files - {cid}}  # each keeps its manifest anyway
    if not known:
        print("No models. Add one with: meshnode model add PATH (or example:smollm2)")
    for cid, (manifest, _variant) in sorted(known.items(), key=lambda item: item[1][0].created_ms):
        note = "  pinned" if cid in pinned else ""
        print(f"{manifest.name:<28} {manifest.version:<12} {', '.join(manifest.variants):<18} {cid}{note}")
    for broken, why in bad.items():
        print(f"The manifest {broken} is damaged: {why}. Add the model again.", file=sys.stderr)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    with open_store(arguments) as store:
        cid, manifest, _ = found(arguments, store)
    if arguments.json:
        import dataclasses

        print(json.dumps({"cid": cid, **dataclasses.asdict(manifest)}, indent=2))
    else:
        print_model(cid, manifest)
    return 0


def print_model(cid: Cid, manifest: Manifest) -> None:
    shape = manifest.architecture
    print(f"{manifest.name} {manifest.version}   {cid}")
    print(
        f"  {shape.family}, {shape.layers} layers of width {shape.hidden}, {shape.vocab} tokens, "
        f"context {shape.context}; published by {manifest.publisher}"
    )
    for variant in manifest.variants.values():
        size = variant.span_bytes(0, shape.layers) + variant.graph.size
        line = f"  {variant.name:<5} {format_size(size):>8}  kernels {variant.kernel_class}"
        if quality := variant.quality:
            line += f"  perplexity {quality.perplexity_milli / 1000:.2f}"
            if quality.reference_milli:
                line += f" (fp32 checkpoint {quality.reference_milli / 1000:.2f})"
            line += f" on {quality.tokens} tokens of {quality.text}"
        print(line)


def _verify(arguments: argparse.Namespace) -> int:
    """Hash every file anew; exit code 4 if one is damaged or missing."""
    with open_store(arguments) as store:
        cid, manifest, _ = found(arguments, store)
        wrong, good, elsewhere = [], 0, 0
        promised = store.pins().get(cid, frozenset())  # all files where it was published, none elsewhere
        for file, name in file_names(manifest).items():
            match store.sound(file):
                case True:
                    good += 1
                case False:
                    wrong.append(f"{name} ({file}) was damaged or deleted")
                case None if file in promised:
                    wrong.append(f"{name} ({file}) is missing")
                case None:
                    elsewhere += 1
    if wrong:
        raise ModelError(
            f"{manifest.name} {manifest.version}: {'; '.join(wrong)}. What was damaged is removed; the running node "
            "fetches what it needs again from any node that has it. If none has, add the model again from its source "
            "(meshnode model add), or from a CAR file (meshnode model import)."
        )
    others = f"; {elsewhere} more are not on this node" if elsewhere else ""
    print(f"{manifest.name} {manifest.version}: {good} files are as they were published{others}.")
    return 0


def file_names(manifest: Manifest) -> dict[Cid, str]:
    """Every file of a release with what it is in the model: "layer.7", "graph", "tokenizer.json"."""
    names: dict[Cid, str] = {ref.cid: name for name, ref in manifest.files.items()}
    for variant in manifest.variants.values():
        prefix = f"{variant.name} " if len(manifest.variants) > 1 else ""
        for name, ref in variant.files().items():
            names.setdefault(ref.cid, prefix + name)
    return names


def _serve(arguments: argparse.Namespace) -> int:
    from meshnode.api.releases import check_variant

    with open_store(arguments) as store:
        cid, manifest, before = found(arguments, store)
    variant = arguments.variant or before
    check_variant(manifest, variant)
    adopt(arguments, cid, manifest, variant)
    return 0
