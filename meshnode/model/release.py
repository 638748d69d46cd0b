"""The model that the network serves: the one type for it."""

from __future__ import annotations

from dataclasses import dataclass

from meshnode.model.fit import ModelFacts, Range
from protocols.advert.messages import Span
from protocols.ids import Cid
from protocols.manifest.messages import Manifest, Variant


@dataclass(frozen=True, slots=True)
class ServedRelease:
    """A release that is announced, with its manifest fetched and checked."""

    cid: Cid  # of the manifest
    variant_name: str
    manifest: Manifest
    facts: ModelFacts

    @property
    def variant(self) -> Variant:
        return self.manifest.variants[self.variant_name]

    @property
    def title(self) -> str:
        """For people: "smollm2-135m-instruct int4"."""
        return f"{self.manifest.name} {self.variant_name}"

    @property
    def token_space(self) -> tuple[object, ...]:
        """What decides how text becomes token ids, and where an answer ends; equal where ids mean the same."""
        shape = self.manifest.architecture
        return self.manifest.files.get("tokenizer.json"), shape.vocab, shape.context, shape.bos_ids, shape.eos_ids

    def span(self, layers: Range) -> Span:
        return Span(manifest=self.cid, variant=self.variant_name, first=layers[0], last=layers[1])

    def layers_of(self, span: Span) -> Range | None:
        """The layers of a span of this release; None for a span of another one."""
        return (span.first, span.last) if (span.manifest, span.variant) == (self.cid, self.variant_name) else None
