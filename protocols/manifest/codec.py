"""dag-cbor of a signed manifest. See SPEC.md.

    {"key": 32 bytes, "manifest": {...}, "signature": 64 bytes}

The manifest is embedded as a map with real CID links, not as opaque bytes, so that any IPLD tool can walk and
pin the whole release from its root. The signature covers the dag-cbor bytes of the embedded map.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO
from typing import Any, Final

import cbor2
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import DAG_PB, RAW, Cid, PeerId, cid_codec, cid_from_bytes, cid_to_bytes, peer_id_of
from protocols.manifest.messages import (
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    SCHEMA,
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
MAX_DEPTH: Final = 8

_LINK: Final = 42  # the CBOR tag of a CID in dag-cbor
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.\-]{0,63}")
_VARIANT: Final = re.compile(r"[a-z0-9][a-z0-9.\-]{0,31}")
_FILE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._\-]{0,127}")
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/\-]{0,63}")
_VERSION: Final = re.compile(r"v(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})-(0|[1-9][0-9]{0,8})")


class NotAManifest(RemoteProtocolError):
    """A block that is something else than a signed manifest."""


class _Wrong(ValueError):
    """A value that a manifest can't have; the border decides whose fault it is."""


# ---------------------------------------------------------------- dag-cbor


def _plain_only(item: Any, left: int = MAX_DEPTH) -> None:
    """Raise `_Wrong` for anything that dag-cbor or this schema does not know."""
    if left < 0:
        raise _Wrong(f"a manifest is nested deeper than {MAX_DEPTH} levels")
    if isinstance(item, dict):
        for key, value in item.items():
            if not isinstance(key, str):
                raise _Wrong(f"a map of a manifest has the key {key!r}; keys are text")
            _plain_only(value, left - 1)
    elif isinstance(item, list):
        for value in item:
            _plain_only(value, left - 1)
    elif isinstance(item, cbor2.CBORTag):
        if item.tag != _LINK or not isinstance(item.value, bytes):
            raise _Wrong(f"a manifest has the CBOR tag {item.tag}; only links (42) are allowed")
    elif item is not None and not isinstance(item, (str, bytes, int)):
        raise _Wrong(f"a manifest has a value of the type {type(item).__name__}")


def _dumps(item: Any) -> bytes:
    return cbor2.dumps(item, canonical=True)


def _loads(data: bytes) -> Any:
    stream = BytesIO(data)
    try:
        item = cbor2.CBORDecoder(stream).decode()
        if stream.tell() != len(data) and stream.read(1):
            raise _Wrong("bytes follow after the end of a manifest")
        _plain_only(item)
        again = _dumps(item)
    except _Wrong:
        raise
    except (cbor2.CBORError, ValueError, TypeError, RecursionError, OverflowError, MemoryError) as error:
        raise _Wrong(f"a manifest is not dag-cbor: {error}") from error
    if again != data:
        raise _Wrong("a manifest is not in canonical dag-cbor (it decodes, but encodes differently)")
    return item


# ---------------------------------------------------------------- one value


def _map(value: Any, what: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(f"{what} is a {type(value).__name__}, not a map")
    if set(value) != set(keys):
        odd = sorted(str(k) for k in set(value) ^ set(keys))
        raise _Wrong(f"{what} lacks or has too much: {', '.join(odd)[:120]}")
    return value


def check_release(name: str | None, version: str) -> None:
    """Raise LocalProtocolError, with an example, unless a manifest can carry this name and version."""
    if name is not None and _NAME.fullmatch(name) is None:
        raise LocalProtocolError(
            f"{name!r} is no name for a model: lower-case letters, digits, dots and dashes, as in tiny-1.1b"
        )
    if _VERSION.fullmatch(version) is None:
        raise LocalProtocolError(f"{version!r} is no version of a release; write it like v1.0.0-0")


def _int(value: Any, what: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _Wrong(f"{what} is {str(value)[:40]}, allowed are {low} to {high}")
    return value


def _matched(value: Any, what: str, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise _Wrong(f"{what} is {str(value)[:80]!r}, which does not fit the form {pattern.pattern}")
    return value


def _entries(value: Any, what: str, low: int, high: int) -> dict[str, Any]:
    if not isinstance(value, dict) or not low <= len(value) <= high:
        raise _Wrong(f"{what} is not a map of {low} to {high} entries")
    return value


def _link_to_wire(cid: str) -> cbor2.CBORTag:
    try:
        return cbor2.CBORTag(_LINK, b"\x00" + cid_to_bytes(cid))
    except RemoteProtocolError as error:
        raise _Wrong(str(error)) from None


def _link_from_wire(value: Any, what: str) -> Cid:
    if not isinstance(value, cbor2.CBORTag) or value.tag != _LINK or value.value[:1] != b"\x00":
        raise _Wrong(f"{what} is not a link")
    try:
        return cid_from_bytes(value.value[1:])
    except RemoteProtocolError as error:
        raise _Wrong(f"{what}: {error}") from None


# ---------------------------------------------------------------- the schema

_SHAPE: Final = ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "context")
_TEXTS: Final = ("text",)
_FIGURES: Final = ("tokens", "perplexity_milli", "reference_milli")


def _file_to_wire(file: FileRef) -> dict[str, Any]:
    return {"cid": _link_to_wire(file.cid), "size": file.size}


def _file_from_wire(value: Any, what: str) -> FileRef:
    raw = _map(value, what, ("cid", "size"))
    cid = _link_from_wire(raw["cid"], f"{what}.cid")
    if cid_codec(cid) not in (RAW, DAG_PB):
        raise _Wrong(f"{what}.cid is not the CID of a file")
    return FileRef(cid=cid, size=_int(raw["size"], f"{what}.size", 0, MAX_FILE_BYTES))


def _ids_from_wire(value: Any, what: str, vocab: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_IDS:
        raise _Wrong(f"{what} is not an array of at most {MAX_IDS} token ids")
    return tuple(_int(i, what, 0, vocab - 1) for i in value)


def _architecture_from_wire(value: Any) -> Architecture:
    raw = _map(value, "architecture", ("family", *_SHAPE, "bos_ids", "eos_ids"))
    count = {n: _int(raw[n], f"architecture.{n}", 1, MAX_LAYERS if n == "layers" else MAX_COUNT) for n in _SHAPE}
    if count["heads"] % count["kv_heads"]:
        raise _Wrong(f"architecture has {count['heads']} heads, which {count['kv_heads']} KV heads can't share")
    return Architecture(
        family=_matched(raw["family"], "architecture.family", _WORD),
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
    raw = _map(value, what, (*_TEXTS, *_FIGURES))
    figures = {n: _int(raw[n], f"{what}.{n}", 0, MAX_MS) for n in _FIGURES}
    return Quality(text=_matched(raw["text"], f"{what}.text", _WORD), **figures)


def _variant_from_wire(name: str, value: Any, layers: int) -> Variant:
    what = f"variant {name}"
    raw = _map(value, what, ("kernel_class", "graph", "embed", "layers", "head", "quality"))
    listed = raw["layers"]
    if not isinstance(listed, list) or len(listed) != layers:
        raise _Wrong(f"{what} does not list one group for each of the {layers} layers")
    return Variant(
        name=name,
        kernel_class=_matched(raw["kernel_class"], f"{what}.kernel_class", _WORD),
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
            raise _Wrong(f"the file {ref.cid} has two sizes: {sizes[ref.cid]} and {ref.size}")


def _manifest_from_wire(value: Any) -> Manifest:
    keys = ("schema", "name", "version", "created_ms", "publisher", "architecture", "files", "variants")
    if isinstance(value, dict) and value.get("schema") != SCHEMA:
        raise _Wrong(f"a manifest of the schema {str(value.get('schema'))[:20]}; this node reads schema {SCHEMA}")
    raw = _map(value, "a manifest", keys)
    architecture = _architecture_from_wire(raw["architecture"])
    files = _entries(raw["files"], "files", 0, MAX_FILES)
    variants = _entries(raw["variants"], "variants", 1, MAX_VARIANTS)
    publisher = raw["publisher"]
    if not isinstance(publisher, str):
        raise _Wrong("the publisher of a manifest is not a text")
    manifest = Manifest(
        name=_matched(raw["name"], "name", _NAME),
        version=_matched(raw["version"], "version", _VERSION),
        created_ms=_int(raw["created_ms"], "created_ms", 0, MAX_MS),
        publisher=PeerId(publisher),
        architecture=architecture,
        files={_matched(n, "a file name", _FILE): _file_from_wire(f, f"file {n[:80]}") for n, f in files.items()},
        variants={
            _matched(n, "a variant name", _VARIANT): _variant_from_wire(n, v, architecture.layers)
            for n, v in variants.items()
        },
    )
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


def _local(work: Callable[[], bytes]) -> bytes:
    try:
        data = work()
    except _Wrong as wrong:
        raise LocalProtocolError(f"A manifest can't be written: {wrong}.") from None
    if len(data) > MAX_MANIFEST_BYTES:
        raise LocalProtocolError(
            f"A manifest of {len(data)} bytes can't be written; the limit is {MAX_MANIFEST_BYTES}."
        )
    return data


def encode_manifest(manifest: Manifest) -> bytes:
    """The dag-cbor bytes that a signature covers.

    Raises:
      LocalProtocolError: a field breaks its limit.
    """

    def work() -> bytes:
        raw = _manifest_to_wire(manifest)
        if _manifest_from_wire(raw) != manifest:
            raise _Wrong("a variant is filed under another name than its own")
        return _dumps(raw)

    return _local(work)


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
    return _local(lambda: _dumps(wire))


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
        block = _map(_loads(bytes(data)), "a signed manifest", ("key", "manifest", "signature"))
    except _Wrong as wrong:
        raise NotAManifest(f"A manifest can't be used: {wrong}.") from None
    try:
        public, signature = block["key"], block["signature"]
        if not isinstance(public, bytes) or len(public) != 32:
            raise _Wrong("the key of a signed manifest does not have 32 bytes")
        if not isinstance(signature, bytes) or len(signature) != 64:
            raise _Wrong("the signature of a manifest does not have 64 bytes")
        manifest = _manifest_from_wire(block["manifest"])
    except _Wrong as wrong:
        raise RemoteProtocolError(f"A manifest can't be used: {wrong}.") from None
    signer = peer_id_of(public)
    try:
        VerifyKey(public).verify(DOMAIN + _dumps(block["manifest"]), signature)
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
