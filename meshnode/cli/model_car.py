"""`meshnode model export` and `import`: a model as one CAR file, for devices that are never online together."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from meshnode.cli.main import add_data
from meshnode.cli.settings import folder_of
from meshnode.core.errors import ModelError
from meshnode.core.sizes import format_size

if TYPE_CHECKING:
    from meshnode.store.blob_store import BlobStore
    from protocols.ids import Cid
    from protocols.manifest.messages import FileRef, Manifest


def add_actions(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from meshnode.cli.model import add_serve

    export = actions.add_parser("export", help="write a model into one CAR file, for a device that is never online")
    export.add_argument("model", metavar="NAME_OR_CID")
    export.add_argument("--car", required=True, type=Path, metavar="FILE", help="where to write it")
    export.add_argument("--variant", action="append", help="only this precision; repeatable (default: all)")
    export.add_argument("--force", action="store_true", help="replace the file if it exists")
    add_data(export)
    bring_in = actions.add_parser("import", help="take a model out of a CAR file, every block verified")
    bring_in.add_argument("car", type=Path, metavar="FILE.car")
    add_serve(bring_in)
    add_data(bring_in)


def export_model(arguments: argparse.Namespace) -> int:
    """Write the CAR; exit code 4 if files of the model are not on this node."""
    from meshnode.api.releases import check_variant
    from meshnode.cli.model import StepProgress, found, open_store
    from meshnode.ipfs.car_export import export_car, files_of

    with open_store(arguments) as store:
        cid, manifest, _ = found(arguments, store)
        variants = tuple(dict.fromkeys(arguments.variant or manifest.variants))
        for name in variants:
            check_variant(manifest, name)
        files = files_of(manifest, variants)
        missing = [ref for ref in files if store.path(ref.cid) is None]
        if missing:
            raise ModelError(_lacks(store, manifest, files, missing))
        steps = StepProgress()
        size = export_car(
            store,
            cid,
            files,
            arguments.car,
            replace=arguments.force,
            progress=lambda done, total: steps("export", "", done, total),
        )
    print(f"{manifest.name} {manifest.version} ({', '.join(variants)}) is in {arguments.car}, {format_size(size)}.")
    print("On the other device: meshnode model import FILE.car")
    print(f"Any IPFS node can import it, too; its root is {cid}")
    return 0


def _lacks(store: BlobStore, manifest: Manifest, files: list[FileRef], missing: list[FileRef]) -> str:
    from meshnode.ipfs.car_export import files_of

    whole = [
        name
        for name in manifest.variants
        if all(store.path(ref.cid) is not None for ref in files_of(manifest, (name,)))
    ]
    remedy = (
        f"The variant {whole[0]} is here whole; export it with --variant {whole[0]}."
        if whole
        else f"Fetch them first (meshnode model pin {manifest.name}, while this node runs), or export the model on "
        "the device that added it."
    )
    size = format_size(sum(ref.size for ref in missing))
    return f"{len(missing)} of {len(files)} files of {manifest.name} ({size}) are not on this node. {remedy}"


def import_model(arguments: argparse.Namespace) -> int:
    """Verify and keep what is in the CAR; its smallest variant is meant, or the one that was served."""
    from meshnode.cli.model import StepProgress, adopt, check_may_publish, open_store
    from meshnode.ipfs.car_import import import_car

    if arguments.serve:
        check_may_publish(arguments)  # before the long work
    steps = StepProgress()
    with open_store(arguments, adds=True) as store:
        found = import_car(store, arguments.car, progress=lambda done, total: steps("import", "", done, total))
    print(f"{found.manifest.name} {found.manifest.version} ({', '.join(found.variants)}) is here and verified.")
    others = [name for name in found.manifest.variants if name not in found.variants]
    if others:
        print(f"Not in the file, or not whole: {', '.join(others)}.")
    variant = _served(folder_of(arguments), found.cid, found.variants)
    if variant not in found.manifest.servable:
        print(f"Nothing changes about what is served: the variant {variant} is for training.")
        return 0
    adopt(arguments, found.cid, found.manifest, variant)
    return 0


def _served(folder: Path, cid: Cid, variants: tuple[str, ...]) -> str:
    """The variant in which this node knows the release already, if it is whole now; else the smallest."""
    from meshnode.core.paths import Paths
    from meshnode.state import releases
    from meshnode.state.database import Database

    with Database(Paths(folder).state) as database:
        before = releases.known(database).get(cid)
    return before if before in variants else variants[0]


ACTIONS: Final = {"export": export_model, "import": import_model}
