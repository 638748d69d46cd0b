"""A small model for the null engine: real files, a real signed manifest, a real tokenizer, weights of noise."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from typing import Final

from nacl.signing import SigningKey

from protocols.ids import PeerId, peer_id_of
from protocols.manifest.codec import sign_manifest
from protocols.manifest.messages import TRAIN, Architecture, FileRef, Manifest, Variant
from protocols.unixfs.builder import file_cid

WORDS: Final = 256  # the vocabulary: "w0" to "w255"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What kind of model. The bytes of its files follow from `seed`."""

    name: str = "noise"
    layers: int = 24
    layer_bytes: int = 1 << 16
    end_bytes: int = 20_000  # of the embedding, and of the head
    hidden: int = 32
    context: int = 4096
    seed: int = 7
    learns: bool = False  # it has the variant `train`, too


@dataclass(frozen=True, slots=True)
class ToyModel:
    """A model before anybody has it: its files, and its signed manifest."""

    manifest: Manifest
    block: bytes  # of the manifest
    files: tuple[bytes, ...]


def make_model(spec: ModelSpec, publisher: SigningKey, created_ms: int) -> ToyModel:
    """A model that this key has published."""
    noise = random.Random(spec.seed)
    files: list[bytes] = []

    def file(data: bytes) -> FileRef:
        files.append(data)
        return FileRef(cid=file_cid(data), size=len(data))

    variant = Variant(
        name="int4",
        kernel_class="null/1",
        graph=file(noise.randbytes(5_000)),
        embed=file(noise.randbytes(spec.end_bytes)),
        layers=tuple(file(noise.randbytes(spec.layer_bytes)) for _ in range(spec.layers)),
        head=file(noise.randbytes(spec.end_bytes)),
        quality=None,
    )
    variants = {variant.name: variant}
    shared = {"tokenizer.json": file(_tokenizer())}
    if spec.learns:
        variants[TRAIN] = replace(variant, name=TRAIN, graph=file(b"{}"))
        shared["config.json"] = file(json.dumps({"intermediate_size": 2 * spec.hidden}).encode())
    manifest = Manifest(
        name=spec.name,
        version="v1.0.0-0",
        created_ms=created_ms,
        publisher=PeerId(peer_id_of(bytes(publisher.verify_key))),
        architecture=Architecture(
            family="llama",
            layers=spec.layers,
            hidden=spec.hidden,
            heads=1,
            kv_heads=1,
            head_dim=4,
            vocab=WORDS,
            context=spec.context,
            bos_ids=(),
            eos_ids=(),
        ),
        files=shared,
        variants=variants,
    )
    return ToyModel(manifest, sign_manifest(publisher, manifest), tuple(files))


def _tokenizer() -> bytes:
    """Words between blanks."""
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(WORDS)}, "unk_token": "w0"},
        }
    ).encode()
