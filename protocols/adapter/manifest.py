"""The manifest of an adapter that is served: dag-cbor, named by its CID. See SPEC.md.

    {"base": link, "first": 20, "frame": link, "layers": [{"cid": link, "size": bytes}, ...], "schema": 1, ...}

There is no signature in it: whoever releases an adapter signs its CID.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from protocols.dag_cbor import Wrong, a_map, an_int, dumps, link_from_wire, link_to_wire, loads, written
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, DAG_PB, RAW, Cid, cid_codec, cid_of
from protocols.manifest.messages import MAX_LAYERS, FileRef

SCHEMA: Final = 1
MAX_MANIFEST_BYTES: Final = 1 << 17  # 1024 layers take 67 KB
MAX_LAYER_BYTES: Final = 1 << 26  # a layer's file goes to an engine as the body of one frame
MAX_VERSION: Final = (1 << 31) - 1

_FIELDS: Final = ("schema", "base", "frame", "version", "first", "layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterManifest:
    """One adapter, as stages fetch it: each only the files of its layers."""

    base: Cid  # manifest of the release that it adapts
    frame: Cid  # its shape (`protocols/delta/frame.py`)
    version: int  # of whoever made it; people read it, nodes do not
    first: int  # its layers are [first, last)
    layers: tuple[FileRef, ...]  # one file each (`meshnode/model/adapter_file.py`)

    @property
    def last(self) -> int:
        return self.first + len(self.layers)

    @property
    def cid(self) -> Cid:
        """Raises LocalProtocolError for a manifest that can't be written."""
        return cid_of(DAG_CBOR, encode_adapter(self))

    def files(self, first: int, last: int) -> dict[int, FileRef]:
        """The files that a span [first, last) needs, by layer; none when the adapter leaves it as it is."""
        found = range(max(first, self.first), min(last, self.last))
        return {layer: self.layers[layer - self.first] for layer in found}


def encode_adapter(manifest: AdapterManifest) -> bytes:
    """The block that the adapter's CID names.

    Raises:
      LocalProtocolError: a field breaks its limit.
    """

    def work() -> bytes:
        raw = _to_wire(manifest)
        _from_wire(raw)
        return dumps(raw)

    return written(work, "the manifest of an adapter", MAX_MANIFEST_BYTES)


def decode_adapter(data: bytes) -> AdapterManifest:
    """Check a block and give the manifest in it.

    Raises:
      RemoteProtocolError: too large, not canonical dag-cbor, a field missing, unknown or out of its limits.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise RemoteProtocolError(
            f"A manifest of an adapter of {len(data)} bytes; the limit is {MAX_MANIFEST_BYTES}."
        )
    try:
        return _from_wire(loads(bytes(data), "it"))
    except Wrong as wrong:
        raise RemoteProtocolError(f"The manifest of an adapter can't be used: {wrong}.") from None


def _to_wire(manifest: AdapterManifest) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "base": link_to_wire(manifest.base),
        "frame": link_to_wire(manifest.frame),
        "version": manifest.version,
        "first": manifest.first,
        "layers": [{"cid": link_to_wire(file.cid), "size": file.size} for file in manifest.layers],
    }


def _from_wire(value: Any) -> AdapterManifest:
    if isinstance(value, dict) and value.get("schema") != SCHEMA:
        raise Wrong(f"its schema is {str(value.get('schema'))[:20]}; this node reads schema {SCHEMA}")
    raw = a_map(value, "it", _FIELDS)
    an_int(raw["schema"], "schema", SCHEMA, SCHEMA)  # true is 1 to Python, and another block
    links = {name: link_from_wire(raw[name], name) for name in ("base", "frame")}
    for name, link in links.items():
        if cid_codec(link) != DAG_CBOR:
            raise Wrong(f"{name} is not the CID of a dag-cbor block")
    first = an_int(raw["first"], "first", 0, MAX_LAYERS - 1)
    listed = raw["layers"]
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_LAYERS - first:
        raise Wrong(f"layers is not an array of 1 to {MAX_LAYERS - first} files")
    return AdapterManifest(
        **links,
        version=an_int(raw["version"], "version", 0, MAX_VERSION),
        first=first,
        layers=tuple(_file(item, f"layers[{index}]") for index, item in enumerate(listed)),
    )


def _file(value: Any, what: str) -> FileRef:
    raw = a_map(value, what, ("cid", "size"))
    cid = link_from_wire(raw["cid"], f"{what}.cid")
    if cid_codec(cid) not in (RAW, DAG_PB):
        raise Wrong(f"{what}.cid is not the CID of a file")
    return FileRef(cid=cid, size=an_int(raw["size"], f"{what}.size", 1, MAX_LAYER_BYTES))
