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
from meshnode.client import Client
from meshnode.core.errors import ConfigError, Declined, IdentityError, ModelError
from meshnode.core.paths import PUBLISH_PREFIX, Paths
from meshnode.core.sizes import counted, format_size

if TYPE_CHECKING:
    from meshnode.store.blob_store import BlobStore
    from meshnode.store.cipher import Cipher
    from protocols.ids import Cid
    from protocols.manifest.messages import Manifest

VARIANTS: Final = ("int4", "int8", "fp32")  # that can be served
PUBLISHED: Final = (*VARIANTS, "train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser(
        "add", help="publish a Hugging Face folder, a GGUF file or example:smollm2; or fetch a CID"
    )
    add.add_argument("source", metavar="PATH_OR_PACKAGE_OR_CID")
    add.add_argument("--variant", action="append", choices=PUBLISHED, help="repeatable (default int4)")
    add.add_argument("--name", help="lower case, digits, dots and dashes (default: from the source)")
    add.add_argument("--release-version", metavar="vMAJOR.MINOR.PATCH-ADAPTER", help="default v1.0.0-0")
    add_serve(add)
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
            action.set_defaults(serve=True)
        if name == "show":
            action.add_argument("--json", action="store_true")
        add_data(action)
    add_data(actions.add_parser("list", help="models that this node knows"))
    add_data(actions.add_parser("retract", help="take back this node's word about which model is served"))
    model_keep.add_actions(actions)
    model_car.add_actions(actions)


def run(arguments: argparse.Namespace) -> int:
    actions = {"add": _add, "list": _list, "show": _show, "verify": _verify, "serve": _serve, "retract": _retract}
    actions |= model_keep.ACTIONS | model_car.ACTIONS
    return actions[arguments.action](arguments)


# ---------------------------------------------------------------- publishing


def _add(arguments: argparse.Namespace) -> int:
    """Publish into the node's store and sign; or take what a CID names."""
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
    servable = [name for name in variants if name in VARIANTS]
    if not servable:
        raise ConfigError("the variant train can't be served; add it beside another: --variant int4 --variant train")
    version = arguments.release_version or FIRST_VERSION
    folder = folder_of(arguments)
    paths = Paths(folder)
    identity = Identity.load(folder, ask_passphrase)
    # Neither is said after half a minute of publishing.
    check_may_publish(arguments, "publish models")
    try:
        check_release(arguments.name, version)
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
    adopt(arguments, cid, manifest, servable[0])
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


def may_publish(arguments: argparse.Namespace) -> bool:
    """Whether `check_may_publish` lets it pass."""
    try:
        check_may_publish(arguments)
    except (Declined, IdentityError):
        return False
    return True


def check_may_publish(arguments: argparse.Namespace, deed: str = "say which model the network serves") -> None:
    """Raises Declined `forbidden` when this node lacks the role publish, which `deed` needs; IdentityError.

    A node that belongs to no network yet is asked again when it starts.
    """
    from meshnode.membership.enrolment import require_role
    from meshnode.membership.network import has_network
    from meshnode.state.database import Database
    from protocols.membership.messages import PUBLISH

    folder = folder_of(arguments)
    if not has_network(folder):
        return
    with Database(Paths(folder).state) as database:
        require_role(folder, database, PUBLISH, deed)


def add_serve(parser: argparse.ArgumentParser) -> None:
    """The flag of commands that bring a model."""
    parser.add_argument(
        "--serve", action="store_true", help="have the network serve it, even if it serves another model now"
    )


def adopt(arguments: argparse.Namespace, cid: Cid, manifest: Manifest, variant: str, *, missing: int = 0) -> None:
    """Remember a release whose manifest is in the store; a network that serves nothing yet serves it from now on,
    if this node may say so.

    missing: bytes of its files that are not in the store.
    """
    from meshnode.state import releases
    from meshnode.state.database import Database

    node = client_of(arguments)
    running = node.is_running()
    with Database(Paths(node.folder).state) as database:
        releases.remember(database, cid, variant)
        before = releases.served(database)
    other = "" if arguments.serve else _other_model(node, cid, variant) if running else _kept(before, cid, variant)
    if other is None:
        print(f"The network serves {manifest.name} {manifest.version} in {variant} already.")
        return
    allowed = arguments.serve or may_publish(arguments)
    if other or not allowed:
        print(f"{manifest.name} {manifest.version} is {_where(manifest, missing)}.")
        goes_on = f"The network goes on serving {other}; to" if other else "To"
        print(
            f"{goes_on} have it serve this one: meshnode model serve {manifest.name} --variant {variant}"
            if allowed
            else f"{goes_on} have it serve this one needs a node with the role publish (`meshnode members`); "
            f"run there: meshnode model add {cid} --serve"
        )
        return
    if running:
        node.serve(cid, variant=variant)
        print(f"The network now serves {manifest.name} {manifest.version} in {variant}.")
        return
    with Database(Paths(node.folder).state) as database:
        releases.serve_later(database, cid, variant)
    print(f"{manifest.name} {manifest.version} is served in {variant} as soon as this node starts.")


def _where(manifest: Manifest, missing: int) -> str:
    if not missing:
        return "on this node"
    return (
        f"known to this node, but {format_size(missing)} of its files are not here yet: they come when the network "
        f"serves it, or with `meshnode model pin {manifest.name}`"
    )


def _other_model(node: Client, cid: Cid, variant: str) -> str | None:
    """What the network serves, if it is something else; empty: nothing; None: this."""
    served = node.status().model
    if served is None:
        return ""
    if (served.manifest, served.variant) == (cid, variant):
        return None
    return f"{served.name} in {served.variant}"


def _kept(before: tuple[str, Cid, str] | None, cid: Cid, variant: str) -> str:
    """The same of a node that does not run, as far as it knows."""
    return "" if before is None or before[1:] == (cid, variant) else "what it served when this node ran last"


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
    served, word = _served(arguments)
    with open_store(arguments) as store:
        known, bad = known_here(arguments, store)
        pinned = {cid for cid, files in store.pins().items() if files - {cid}}  # each keeps its manifest anyway
    if not known:
        print("No models. Add one with: meshnode model add PATH (or example:smollm2)")
    for cid, (manifest, _variant) in sorted(known.items(), key=lambda item: item[1][0].created_ms):
        note = f"  {word} in {served[cid]}" if cid in served else ""
        note += "  pinned" if cid in pinned else ""
        print(f"{manifest.name:<28} {manifest.version:<12} {', '.join(manifest.variants):<18} {cid}{note}")
    for broken, why in bad.items():
        print(f"The manifest {broken} is damaged: {why}. Add the model again.", file=sys.stderr)
    return 0


def _served(arguments: argparse.Namespace) -> tuple[dict[str, str], str]:
    """What the network serves, by manifest, in which variant; or what it served when this node ran last."""
    from meshnode.state import releases
    from meshnode.state.database import Database

    node = client_of(arguments)
    if node.is_running():
        model = node.status().model
        return ({} if model is None else {model.manifest: model.variant}), "served"
    with Database(Paths(node.folder).state) as database:
        before = releases.served(database)
    return ({} if before is None else {before[1]: before[2]}), "served last"


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
        f"  {shape.family}, {counted(shape.layers, 'layer')} of width {shape.hidden}, {shape.vocab} tokens, "
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
    others = f"; {counted(elsewhere, 'more is', 'more are')} not on this node" if elsewhere else ""
    sound = counted(good, "file is as it was", "files are as they were")
    print(f"{manifest.name} {manifest.version}: {sound} published{others}.")
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
    from meshnode.api.releases import check_servable

    check_may_publish(arguments)
    with open_store(arguments) as store:
        cid, manifest, before = found(arguments, store)
    variant = arguments.variant or before
    check_servable(manifest, variant)
    adopt(arguments, cid, manifest, variant)
    return 0


def _retract(arguments: argparse.Namespace) -> int:
    """What other nodes say counts again; without any word the network serves nothing."""
    node = client_of(arguments)
    node.retract()
    served = node.status().model
    print("This node says no longer which model the network serves.")
    print(f"It serves {served.name} {served.version} now." if served else "Nobody else says it either.")
    return 0
