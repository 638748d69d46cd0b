"""What placement knows about a model: bytes and work of each layer, and of the two ends.

The first stage also holds the embedding, the last one also the final norm and the head. A head is as much
work as several layers (decoding is bound by the bytes that are read), an embedding is a look-up and no work.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Final

from protocols.manifest.messages import Architecture, Manifest

KV_TOKENS: Final = 2048  # every stage keeps room for the keys and values of this many tokens, whatever else it does
KV_ITEM_BYTES: Final = 4  # engines keep keys and values in float32

Range = tuple[int, int]  # layers [first, last)


@dataclass(frozen=True)
class ModelFacts:
    """Sizes and weights of one variant. All integers, so that every node computes the same.

    Args:
      layer_bytes: weight file of each layer.
      embed_bytes, head_bytes: weight files of the ends.
      shared_bytes: counted once instead of twice when one span has both ends (tied embeddings).
      kv_layer_bytes: room for `KV_TOKENS` keys and values of one layer.
      work: compute per layer in thousandths of an average layer; the last one includes the head.
    """

    layer_bytes: tuple[int, ...]
    embed_bytes: int
    head_bytes: int
    shared_bytes: int
    kv_layer_bytes: int
    work: tuple[int, ...]

    @property
    def layers(self) -> int:
        return len(self.layer_bytes)

    @cached_property
    def _bytes_before(self) -> tuple[int, ...]:
        return (0, *accumulate(size + self.kv_layer_bytes for size in self.layer_bytes))

    @cached_property
    def _work_before(self) -> tuple[int, ...]:
        return (0, *accumulate(self.work))

    def need(self, first: int, last: int) -> int:
        """Bytes of memory that a node needs to serve [first, last): weights and the KV reserve."""
        size = self._bytes_before[last] - self._bytes_before[first]
        if first == 0:
            size += self.embed_bytes
        if last == self.layers:
            size += self.head_bytes
            if first == 0:
                size -= self.shared_bytes
        return size

    def weights(self, first: int, last: int) -> int:
        """Bytes of the weight files of [first, last)."""
        return self.need(first, last) - (last - first) * self.kv_layer_bytes

    def span_work(self, first: int, last: int) -> int:
        """Compute of [first, last) in thousandths of a layer, at least 1."""
        return max(1, self._work_before[last] - self._work_before[first])

    def reach(self, first: int, memory_bytes: int, max_layers: int) -> int:
        """The largest `last` so that [first, last) fits; `first` when not even one layer does.

        Args:
          max_layers: most layers, 0 for no such limit.
        """
        last = min(self.layers, first + max_layers) if max_layers else self.layers
        while last > first and self.need(first, last) > memory_bytes:
            last -= 1
        return last


def facts_of(manifest: Manifest, variant: str, *, kv_tokens: int = KV_TOKENS) -> ModelFacts:
    """Facts of one variant of a manifest. Raises KeyError for an unknown variant."""
    files = manifest.variants[variant]
    shape = manifest.architecture
    sizes = tuple(file.size for file in files.layers)
    average = max(1, sum(sizes) // len(sizes))
    work = [max(1, 1000 * size // average) for size in sizes]
    work[-1] += 1000 * files.head.size // average
    tokens = min(kv_tokens, shape.context)
    return ModelFacts(
        layer_bytes=sizes,
        embed_bytes=files.embed.size,
        head_bytes=files.head.size,
        shared_bytes=files.head.size if files.head.cid == files.embed.cid else 0,
        kv_layer_bytes=kv_bytes(shape, 1, tokens),
        work=tuple(work),
    )


def kv_bytes(shape: Architecture, layers: int, tokens: int) -> int:
    """Bytes of keys and values of one session in so many layers."""
    return layers * 2 * shape.kv_heads * shape.head_dim * KV_ITEM_BYTES * tokens


def tight_memory(facts: ModelFacts, nodes: int) -> int:
    """The least memory that each of `nodes` equal nodes must give so that together they hold the model.

    The slack is less than one layer, so fewer of them can't hold it (unless one layer or end dwarfs the rest).
    """
    low, high = 0, facts.need(0, facts.layers)
    while low < high:
        middle = (low + high) // 2
        first = 0
        for _ in range(nodes):
            first = facts.reach(first, middle, 0) if first < facts.layers else first
        if first >= facts.layers:
            high = middle
        else:
            low = middle + 1
    return high
