"""From the publisher's folder to a signed manifest in the content store. No torch here.

`run_publisher` starts the child process that reads a checkpoint (`publish.py`) and turns what goes wrong there
into one sentence; `release` takes the files it left into the store and signs their manifest.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from nacl.signing import SigningKey

from meshnode.core.errors import ConfigError, DiskError, FatalError, ModelError
from meshnode.core.reasons import cause
from meshnode.store.port import Content
from protocols.errors import LocalProtocolError
from protocols.ids import DAG_CBOR, Cid, PeerId
from protocols.manifest.codec import sign_manifest
from protocols.manifest.messages import Architecture, FileRef, Manifest, Quality, Variant

FIRST_VERSION: Final = "v1.0.0-0"
NEEDED: Final = ("torch", "transformers", "mobius", "safetensors", "gguf")
_ERRORS: Final[dict[str, type[FatalError]]] = {"model": ModelError, "disk": DiskError, "config": ConfigError}
_TAIL_CHARACTERS: Final = 2000  # of the child's stderr, for a failure that it could not name itself

Progress = Callable[[str, str, int, int], None]
"""(step, variant, done, total); steps: open, graph, weights, reference, quality. `variant` may be empty."""


def run_publisher(source: str, out: Path, variants: Sequence[str], progress: Progress | None = None) -> None:
    """Read a checkpoint and write the files of a release into `out`, in a child process. Blocking.

    Args:
      source: a Hugging Face folder, a .gguf file, or "example:smollm2".
      out: a folder on the disk of the content store (files are then linked, not copied).
      variants: "int4", "int8", "fp32", "train".
      progress: called for every step, from this thread.

    Raises:
      ModelError: the source can't be used, or the publisher's packages are missing.
      DiskError: no room or no permission.
      ConfigError: an unknown variant.
    """
    command = [sys.executable, "-P", "-m", "meshnode.publisher.publish", "--source", source, "--out", str(out)]
    for variant in variants:
        command += ["--variant", variant]
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"Adding a model needs packages that are not installed here ({', '.join(missing)}). "
            "Install them: pip install 'meshnode[publish]'"
        )
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        ) as child:
            assert child.stdout is not None
            try:
                finished = _follow(child.stdout, progress)
            except BaseException:
                child.kill()  # Ctrl-C or a raised sentence: nobody reads the child any more
                raise
            status = child.wait()
        errors.seek(0)
        last = errors.read()[-_TAIL_CHARACTERS:].strip().splitlines()
    if not finished:
        why = last[-1].strip(" .") if last else "it said nothing"
        killed = f" (killed by signal {-status}; the machine may be out of memory)" if status < 0 else ""
        raise ModelError(f"Reading {source} failed{killed}: {why}.")


def _follow(lines: Iterable[str], progress: Progress | None) -> bool:
    """Read the child's lines to their end; tells whether it finished. Raises what it reports."""
    finished = False
    for line in lines:
        report = json.loads(line)
        if "error" in report:
            raise _ERRORS.get(report["error"], ModelError)(report["text"])
        if "finished" in report:
            finished = True
        elif progress is not None:
            progress(report["step"], report["variant"], report["done"], report["total"])
    return finished


def release(
    folder: Path,
    store: Content,
    sign_key: SigningKey,
    *,
    created_ms: int,
    publisher: PeerId,
    name: str | None = None,
    version: str = FIRST_VERSION,
) -> tuple[Cid, Manifest]:
    """Take the files of a release into the content store, sign and keep its manifest. Blocking.

    Every file and the manifest itself are pinned under the CID of the manifest.

    Args:
      folder: what `run_publisher` wrote.
      created_ms: UTC milliseconds, goes into the manifest.
      publisher: peer id of `sign_key`.
      name: lower case, digits, dots and dashes; None: the name that the source suggests.

    Raises:
      ModelError: index.json or a file it names is missing or damaged, or the name or version has no valid form.
      DiskError: the store has no room.
    """
    index = _read_index(folder)
    pin = f"release {created_ms}"  # holds the files until the manifest does
    try:
        manifest = _taken(folder, index, store, pin, name, version, created_ms, publisher)
        block = sign_manifest(sign_key, manifest)
        cid = store.put_block(block, DAG_CBOR)
        for held in (cid, *manifest.all_files()):
            store.pin(held, cid)
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / 'index.json'} is not complete ({error}). Run `meshnode model add` again."
        ) from error
    except LocalProtocolError as error:
        raise ModelError(str(error)) from error
    finally:
        store.unpin(pin)
    return cid, manifest


def _taken(
    folder: Path,
    index: dict[str, Any],
    store: Content,
    pin: str,
    name: str | None,
    version: str,
    created_ms: int,
    publisher: PeerId,
) -> Manifest:
    """The manifest of a folder whose files are now in the store, pinned under `pin`."""

    def add(entry: dict[str, Any]) -> FileRef:
        path = folder / entry["path"]
        if not path.is_file() or path.stat().st_size != entry["size"]:
            raise ModelError(f"{path} is missing or not complete. Run `meshnode model add` again.")
        return FileRef(cid=store.add_file(path, pin=pin), size=entry["size"])

    return Manifest(
        name=name or index["name"],
        version=version,
        created_ms=created_ms,
        publisher=publisher,
        architecture=_architecture(index["architecture"]),
        files={file: add(entry) for file, entry in index["files"].items()},
        variants={variant: _variant(variant, entry, add) for variant, entry in index["variants"].items()},
    )


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {cause(error)}. Run `meshnode model add` again.") from error
    if not isinstance(index, dict):
        raise ModelError(f"{path} is damaged. Run `meshnode model add` again.")
    return index


def _architecture(raw: dict[str, Any]) -> Architecture:
    return Architecture(**{**raw, "bos_ids": tuple(raw["bos_ids"]), "eos_ids": tuple(raw["eos_ids"])})


def _variant(name: str, raw: dict[str, Any], add: Callable[[dict[str, Any]], FileRef]) -> Variant:
    quality = raw.get("quality")
    return Variant(
        name=name,
        kernel_class=raw["kernel_class"],
        graph=add(raw["graph"]),
        embed=add(raw["embed"]),
        layers=tuple(add(entry) for entry in raw["layers"]),
        head=add(raw["head"]),
        quality=None if quality is None else Quality(**quality),
    )
