"""What a manifest says. Its bytes are dag-cbor (`codec.py`), its name is the CID of those bytes.

A model is a DAG of content-addressed files under one manifest. For each variant there is one weightless
graph (a small ONNX file of the whole model, every layer boundary named) and one weight group (a safetensors
file) per layer, plus the ends. A stage [a, b) needs the graph and the groups of its layers; the first stage
also `embed`, the last also `head`. With tied embeddings, `embed` and `head` may name the same CID.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.ids import Cid, PeerId

SCHEMA: Final = 1
MAX_LAYERS: Final = 1024
MAX_MANIFEST_BYTES: Final = 1 << 20
TRAIN: Final = "train"  # the variant that adapters are trained on; no engine runs it


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRef:
    """A UnixFS file (CIDv1, sha2-256, raw leaves, balanced, 1 MiB chunks, 174 links)."""

    cid: Cid
    size: int  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    family: str  # transformers model_type, e.g. "llama"
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int  # most positions, tokens
    bos_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How good a variant is: measured when it was published, on a fixed text."""

    text: str  # name of the text
    tokens: int
    perplexity_milli: int  # perplexity * 1000
    reference_milli: int  # the same for the fp32 checkpoint in transformers


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One precision of the model."""

    name: str  # "fp32", "int8", "int4"; "train" can't be served
    kernel_class: str  # exactness is promised within one class, e.g. "ort-cpu-int4-b32-a4/1"
    graph: FileRef  # weightless ONNX graph; of "train" the names of its tensors
    embed: FileRef  # group of the first stage's end
    layers: tuple[FileRef, ...]  # one group per layer
    head: FileRef  # group of the last stage's end: final norm and head
    quality: Quality | None

    def groups(self, first: int, last: int) -> dict[str, FileRef]:
        """Groups that the span [first, last) needs: name as in the graph ("layer.7") -> file."""
        out = {f"layer.{i}": self.layers[i] for i in range(first, last)}
        if first == 0:
            out["embed"] = self.embed
        if last == len(self.layers):
            out["head"] = self.head
        return out

    def files(self, first: int = 0, last: int | None = None) -> dict[str, FileRef]:
        """What a stage that serves [first, last) opens, the whole model by default: the groups, and the "graph"."""
        return {"graph": self.graph, **self.groups(first, len(self.layers) if last is None else last)}

    def span_bytes(self, first: int, last: int) -> int:
        """Bytes of the distinct group files of [first, last)."""
        return sum({f.cid: f.size for f in self.groups(first, last).values()}.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    name: str  # "smollm2-135m-instruct": lower case, digits, dots and dashes
    version: str  # vMAJOR.MINOR.PATCH-ADAPTER
    created_ms: int  # UTC milliseconds
    publisher: PeerId
    architecture: Architecture
    files: dict[str, FileRef]  # "config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", ...
    variants: dict[str, Variant]

    @property
    def servable(self) -> list[str]:
        """Names of the variants that can be served. There is one at least (`codec.py`)."""
        return [name for name in self.variants if name != TRAIN]

    def smallest_variant(self) -> str:
        """The name of the variant that can be served with the fewest bytes of weights."""
        return min(self.servable, key=lambda name: self.variants[name].span_bytes(0, self.architecture.layers))

    def files_of(self, *variants: str) -> list[FileRef]:
        """What serving and asking these variants need, the files that all share first; each once.

        Raises KeyError for an unknown variant.
        """
        refs = list(self.files.values())
        for name in variants:
            refs += self.variants[name].files().values()
        return list({ref.cid: ref for ref in refs}.values())

    def all_files(self) -> list[Cid]:
        """CIDs of every file of every variant, each once."""
        return [ref.cid for ref in self.files_of(*self.variants)]
