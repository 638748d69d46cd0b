"""dag-cbor of a signed manifest. See SPEC.md.

    {"key": 32 bytes, "manifest": {...}, "signature": 64 bytes}

The manifest is embedded as a map with real CID links, not as opaque bytes, so that any IPLD tool can walk and
pin the whole release from its root. The signature covers the dag-cbor bytes of the embedded map.
"""

from __future__ import annotations

import re
from typing import Any, Final

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from protocols.dag_cbor import Wrong, a_map, a_text, an_int, dumps, link_from_wire, link_to_wire, loads, written
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import DAG_PB, RAW, Cid, PeerId, cid_codec, peer_id_of
from protocols.manifest.messages import (
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    SCHEMA,
    TRAIN,
    Architecture,
    FileRef,
    Manifest,
    Quality,
    Variant,
)

DOMAIN: Final = b"meshnode/manifest/1\x00"
MAX_FILES: Final = 64
MAX_VARIANTS: Final = 16
MAX_IDS: Final = 64
MAX_FILE_BYTES: Final = 1 << 50
MAX_COUNT: Final = 1 << 31  # of layers' dimensions, positions, tokens
MAX_MS: Final = 1 << 53

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.\-]{0,63}")
_VARIANT: Final = re.compile(r"[a-z0-9][a-z0-9.\-]{0,31}")
_FILE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._\-]{0,127}")
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/\-]{0,63}")
_VERSION: Final = re.compile(r"v(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})-(0|[1-9][0-9]{0,8})")


class NotAManifest(RemoteProtocolError):
    """A block that is something else than a signed manifest."""


def check_release(name: str | None, version: str) -> None:
    """Raise LocalProtocolError, with an example, unless a manifest can carry this name and version."""
    if name is not None and _NAME.fullmatch(name) is None:
        raise LocalProtocolError(
            f"{name!r} is no name for a model: lower-case letters, digits, dots and dashes, as in tiny-1.1b"
        )
    if _VERSION.fullmatch(version) is None:
        raise LocalProtocolError(f"{version!r} is no version of a release; write it like v1.0.0-0")


def _entries(value: Any, what: str, low: int, high: int) -> dict[str, Any]:
    if not isinstance(value, dict) or not low <= len(value) <= high:
        raise Wrong(f"{what} is not a map of {low} to {high} entries")
    return value


# ---------------------------------------------------------------- the schema

_SHAPE: Final = ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "context")
_TEXTS: Final = ("text",)
_FIGURES: Final = ("tokens", "perplexity_milli", "reference_milli")


def _file_to_wire(file: FileRef) -> dict[str, Any]:
    return {"cid": link_to_wire(file.cid), "size": file.size}


def _file_from_wire(value: Any, what: str) -> FileRef:
    raw = a_map(value, what, ("cid", "size"))
    cid = link_from_wire(raw["cid"], f"{what}.cid")
    if cid_codec(cid) not in (RAW, DAG_PB):
        raise Wrong(f"{what}.cid is not the CID of a file")
    return FileRef(cid=cid, size=an_int(raw["size"], f"{what}.size", 0, MAX_FILE_BYTES))


def _ids_from_wire(value: Any, what: str, vocab: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_IDS:
        raise Wrong(f"{what} is not an array of at most {MAX_IDS} token ids")
    return tuple(an_int(i, what, 0, vocab - 1) for i in value)


def _architecture_from_wire(value: Any) -> Architecture:
    raw = a_map(value, "architecture", ("family", *_SHAPE, "bos_ids", "eos_ids"))
    count = {n: an_int(raw[n], f"architecture.{n}", 1, MAX_LAYERS if n == "layers" else MAX_COUNT) for n in _SHAPE}
    if count["heads"] % count["kv_heads"]:
        raise Wrong(f"architecture has {count['heads']} heads, which {count['kv_heads']} KV heads can't share")
    return Architecture(
        family=a_text(raw["family"], "architecture.family", _WORD),
        layers=count["layers"],
        hidden=count["hidden"],
        heads=count["heads"],
        kv_heads=count["kv_heads"],
        head_dim=count["head_dim"],
        vocab=count["vocab"],
        context=count["context"],
        bos_ids=_ids_from_wire(raw["bos_ids"], "architecture.bos_ids", count["vocab"]),
        eos_ids=_ids_from_wire(raw["eos_ids"], "architecture.eos_ids", count["vocab"]),
    )


def _quality_from_wire(value: Any, what: str) -> Quality | None:
    if value is None:
        return None
    raw = a_map(value, what, (*_TEXTS, *_FIGURES))
    figures = {n: an_int(raw[n], f"{what}.{n}", 0, MAX_MS) for n in _FIGURES}
    return Quality(text=a_text(raw["text"], f"{what}.text", _WORD), **figures)


def _variant_from_wire(name: str, value: Any, layers: int) -> Variant:
    what = f"variant {name}"
    raw = a_map(value, what, ("kernel_class", "graph", "embed", "layers", "head", "quality"))
    listed = raw["layers"]
    if not isinstance(listed, list) or len(listed) != layers:
        raise Wrong(f"{what} does not list one group for each of the {layers} layers")
    return Variant(
        name=name,
        kernel_class=a_text(raw["kernel_class"], f"{what}.kernel_class", _WORD),
        graph=_file_from_wire(raw["graph"], f"{what}.graph"),
        embed=_file_from_wire(raw["embed"], f"{what}.embed"),
        layers=tuple(_file_from_wire(f, f"{what}.layers[{k}]") for k, f in enumerate(listed)),
        head=_file_from_wire(raw["head"], f"{what}.head"),
        quality=_quality_from_wire(raw["quality"], f"{what}.quality"),
    )


def _same_sizes(manifest: Manifest) -> None:
    """One CID has one size, wherever it is named."""
    sizes: dict[Cid, int] = {}
    refs = list(manifest.files.values())
    for variant in manifest.variants.values():
        refs += [variant.graph, variant.embed, *variant.layers, variant.head]
    for ref in refs:
        if sizes.setdefault(ref.cid, ref.size) != ref.size:
            raise Wrong(f"the file {ref.cid} has two sizes: {sizes[ref.cid]} and {ref.size}")


def _manifest_from_wire(value: Any) -> Manifest:
    keys = ("schema", "name", "version", "created_ms", "publisher", "architecture", "files", "variants")
    if isinstance(value, dict) and value.get("schema") != SCHEMA:
        raise Wrong(f"a manifest of the schema {str(value.get('schema'))[:20]}; this node reads schema {SCHEMA}")
    raw = a_map(value, "a manifest", keys)
    architecture = _architecture_from_wire(raw["architecture"])
    files = _entries(raw["files"], "files", 0, MAX_FILES)
    variants = _entries(raw["variants"], "variants", 1, MAX_VARIANTS)
    publisher = raw["publisher"]
    if not isinstance(publisher, str):
        raise Wrong("the publisher of a manifest is not a text")
    manifest = Manifest(
        name=a_text(raw["name"], "name", _NAME),
        version=a_text(raw["version"], "version", _VERSION),
        created_ms=an_int(raw["created_ms"], "created_ms", 0, MAX_MS),
        publisher=PeerId(publisher),
        architecture=architecture,
        files={a_text(n, "a file name", _FILE): _file_from_wire(f, f"file {n[:80]}") for n, f in files.items()},
        variants={
            a_text(n, "a variant name", _VARIANT): _variant_from_wire(n, v, architecture.layers)
            for n, v in variants.items()
        },
    )
    if not manifest.servable:
        raise Wrong(f"the variant {TRAIN} can't be served, and there is no other; publish it beside one, as int4")
    _same_sizes(manifest)
    return manifest


def _manifest_to_wire(manifest: Manifest) -> dict[str, Any]:
    architecture = manifest.architecture
    return {
        "schema": SCHEMA,
        "name": manifest.name,
        "version": manifest.version,
        "created_ms": manifest.created_ms,
        "publisher": manifest.publisher,
        "architecture": {
            "family": architecture.family,
            **{n: getattr(architecture, n) for n in _SHAPE},
            "bos_ids": list(architecture.bos_ids),
            "eos_ids": list(architecture.eos_ids),
        },
        "files": {name: _file_to_wire(file) for name, file in manifest.files.items()},
        "variants": {
            name: {
                "kernel_class": variant.kernel_class,
                "graph": _file_to_wire(variant.graph),
                "embed": _file_to_wire(variant.embed),
                "layers": [_file_to_wire(f) for f in variant.layers],
                "head": _file_to_wire(variant.head),
                "quality": None
                if variant.quality is None
                else {n: getattr(variant.quality, n) for n in (*_TEXTS, *_FIGURES)},
            }
            for name, variant in manifest.variants.items()
        },
    }


# ---------------------------------------------------------------- the border


def encode_manifest(manifest: Manifest) -> bytes:
    """The dag-cbor bytes that a signature covers.

    Raises:
      LocalProtocolError: a field breaks its limit.
    """

    def work() -> bytes:
        raw = _manifest_to_wire(manifest)
        if _manifest_from_wire(raw) != manifest:
            raise Wrong("a variant is filed under another name than its own")
        return dumps(raw)

    return written(work, "a manifest", MAX_MANIFEST_BYTES)


def sign_manifest(key: SigningKey, manifest: Manifest) -> bytes:
    """The signed block. Its CID (codec dag-cbor) is the name of the release.

    Raises:
      LocalProtocolError: a field breaks its limit, or `manifest.publisher` is not the peer of `key`.
    """
    public = bytes(key.verify_key)
    if manifest.publisher != peer_id_of(public):
        raise LocalProtocolError(f"A manifest of {manifest.publisher} can't be signed with another peer's key.")
    signature = key.sign(DOMAIN + encode_manifest(manifest)).signature
    wire = {"key": public, "manifest": _manifest_to_wire(manifest), "signature": signature}
    return written(lambda: dumps(wire), "a manifest", MAX_MANIFEST_BYTES)


def open_manifest(data: bytes) -> Manifest:
    """Check a signed block and give its manifest.

    Raises:
      NotAManifest: not canonical dag-cbor, or that of something else.
      RemoteProtocolError: too large, a field missing, unknown or out of its limits, the signature does not hold, or
        the publisher is not the signer.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise RemoteProtocolError(f"A manifest of {len(data)} bytes; the limit is {MAX_MANIFEST_BYTES}.")
    try:
        block = a_map(loads(bytes(data), "a manifest"), "a signed manifest", ("key", "manifest", "signature"))
    except Wrong as wrong:
        raise NotAManifest(f"A manifest can't be used: {wrong}.") from None
    try:
        public, signature = block["key"], block["signature"]
        if not isinstance(public, bytes) or len(public) != 32:
            raise Wrong("the key of a signed manifest does not have 32 bytes")
        if not isinstance(signature, bytes) or len(signature) != 64:
            raise Wrong("the signature of a manifest does not have 64 bytes")
        manifest = _manifest_from_wire(block["manifest"])
    except Wrong as wrong:
        raise RemoteProtocolError(f"A manifest can't be used: {wrong}.") from None
    signer = peer_id_of(public)
    try:
        VerifyKey(public).verify(DOMAIN + dumps(block["manifest"]), signature)
    except (BadSignatureError, ValueError) as error:
        raise RemoteProtocolError(
            f"The signature on the manifest {manifest.name} {manifest.version} of {signer} is wrong. "
            "It was changed on the way or forged; don't use it."
        ) from error
    if manifest.publisher != signer:
        raise RemoteProtocolError(
            f"The manifest {manifest.name} {manifest.version} names {manifest.publisher[:80]} as its publisher, "
            f"but {signer} signed it."
        )
    return manifest
