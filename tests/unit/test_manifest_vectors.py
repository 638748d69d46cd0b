"""vectors.json of the manifest, byte for byte."""

from __future__ import annotations

from dataclasses import replace

from protocols.ids import RAW, cid_of
from protocols.manifest.codec import open_manifest, sign_manifest
from protocols.manifest.messages import FileRef
from tests.unit.test_manifest_codec import KEY, OTHER, manifest, raw_manifest, sealed
from tests.vectors import Case, hold


def cases() -> list[Case]:
    whole = manifest()
    plain = replace(
        whole,
        files={},
        variants={"fp32": whole.variants["fp32"]},
        architecture=replace(whole.architecture, bos_ids=(), eos_ids=()),
    )
    good = sign_manifest(KEY, whole)
    floating = raw_manifest()
    floating["created_ms"] = 1.5
    newer = {**raw_manifest(), "schema": 2}
    empty = replace(plain, files={"LICENSE": FileRef(cid=cid_of(RAW, b""), size=0)})
    return [
        Case("two variants, tied ends", good, whole),
        Case("one variant, no quality, no files", sign_manifest(KEY, plain), plain),
        Case("an empty file", sign_manifest(KEY, empty), empty),
        Case("signed by somebody else", sealed(raw_manifest(), OTHER)),
        Case("a float", sealed(floating)),
        Case("a newer schema", sealed(newer)),
        Case("a byte too many", good + b"\x00"),
        Case("a byte too few", good[:-1]),
        Case("nothing", b""),
    ]


def test_vectors() -> None:
    hold("manifest", cases(), open_manifest)
