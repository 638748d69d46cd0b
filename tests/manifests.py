"""Small manifests: their files are whatever a test says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nacl.signing import SigningKey

from protocols.ids import peer_id_of
from protocols.manifest.codec import sign_manifest
from protocols.manifest.messages import Architecture, FileRef, Manifest, Variant

KEY = SigningKey(b"\x07" * 32)  # of the publisher
SHAPE = Architecture(
    family="llama",
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=1,
    head_dim=16,
    vocab=1000,
    context=2048,
    bos_ids=(1,),
    eos_ids=(2,),
)


def manifest_of(
    file: Callable[[str], FileRef], *, layers: int, name: str = "tiny", variants: Sequence[str] = ("int4",)
) -> Manifest:
    """A release whose only shared file is its tokenizer.

    `file`: asked for "tokenizer.json", and for "graph", "embed", "layer.0", ..., "head" of each variant; with more
    than one of these, "int4 graph" and so on.
    """

    def variant(precision: str) -> Variant:
        of = f"{precision} " if len(variants) > 1 else ""
        return Variant(
            name=precision,
            kernel_class="test/1",
            graph=file(f"{of}graph"),
            embed=file(f"{of}embed"),
            layers=tuple(file(f"{of}layer.{number}") for number in range(layers)),
            head=file(f"{of}head"),
            quality=None,
        )

    return Manifest(
        name=name,
        version="v1.0.0-0",
        created_ms=1,
        publisher=peer_id_of(bytes(KEY.verify_key)),
        architecture=replace(SHAPE, layers=layers),
        files={"tokenizer.json": file("tokenizer.json")},
        variants={precision: variant(precision) for precision in variants},
    )


def block_of(manifest: Manifest) -> bytes:
    """What is stored and fetched."""
    return sign_manifest(KEY, manifest)
