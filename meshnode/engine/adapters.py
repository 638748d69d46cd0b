"""The adapters that an engine process has: announced, filled layer by layer, used by sessions, forgotten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakSet

from meshnode.core.errors import Declined, ModelError
from meshnode.engine.backend import Factors, Stage
from meshnode.model.adapter_file import read_layer
from protocols.enginewire.messages import BAD_ADAPTER, BUSY, FENCED, Adapt, Load

MAX_ADAPTERS: Final = 8  # at once, beside those that only sessions still hold
_RETRY_MS: Final = 1000


@dataclass(eq=False, slots=True, weakref_slot=True)
class Adapter:
    """An adapter, as far as it has come."""

    layers: range
    rank: int
    scale: float
    targets: frozenset[str]
    factors: dict[int, Factors] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(factors.nbytes for factors in self.factors.values())


class Adapters:
    """By name. What they take counts with the keys and values of the sessions."""

    def __init__(
        self,
        stage: Stage,
        load: Load,
        taken: Callable[[], int],
        make_room: Callable[[int], None] = lambda _most: None,
    ) -> None:
        """`taken`: bytes of the keys and values of the sessions.

        `make_room`: have all that is kept for later take no more bytes than this.
        """
        self._stage = stage
        self._load = load
        self._taken = taken
        self._make_room = make_room
        self._known: dict[str, Adapter] = {}
        self._alive: WeakSet[Adapter] = WeakSet()

    @property
    def nbytes(self) -> int:
        """Of all that somebody still holds."""
        return sum(adapter.nbytes for adapter in self._alive)

    def announce(self, adapt: Adapt) -> None:
        """Make the graph ready for it. One of the same name is replaced.

        Raises Declined: `fenced` (layers outside the span), `busy` (too many), `bad-adapter` (the graph takes none).
        """
        load = self._load
        if not load.first <= adapt.first < adapt.last <= load.last:
            raise Declined(
                FENCED,
                f"This engine holds the layers {load.first} to {load.last - 1}; an adapter comes for "
                f"{adapt.first} to {adapt.last - 1}.",
            )
        if len(self._known.keys() - {adapt.adapter}) >= MAX_ADAPTERS:
            raise Declined(BUSY, f"This engine has {MAX_ADAPTERS} adapters already.", retry_ms=_RETRY_MS)
        self._stage.adapt(adapt.first, adapt.last, adapt.targets)
        layers, scale = range(adapt.first, adapt.last), adapt.alpha / adapt.rank
        adapter = Adapter(layers, adapt.rank, scale, frozenset(adapt.targets))
        self._known[adapt.adapter] = adapter
        self._alive.add(adapter)

    def fill(self, name: str, layer: int, content: bytes) -> None:
        """Take the file of one layer.

        Raises Declined: `fenced` (not announced), `busy` (no memory), `bad-adapter` (damaged, or for another model).
        """
        adapter = self._known.get(name)
        if adapter is None or layer not in adapter.layers:
            raise Declined(FENCED, f"The layer {layer} of this adapter was not announced. Announce it again.")
        try:
            pairs = read_layer(content, adapter.rank)
        except ModelError as error:
            raise Declined(BAD_ADAPTER, f"The file of layer {layer} of the adapter can't be used: {error}.") from None
        if pairs.keys() != adapter.targets:
            odd = ", ".join(sorted(pairs.keys() ^ adapter.targets))
            raise Declined(BAD_ADAPTER, f"The file of layer {layer} of the adapter lacks or has too much: {odd}.")
        factors = self._stage.factors(layer, pairs, adapter.scale)
        taken, most = self._taken() + self.nbytes, self._load.max_kv_bytes
        if taken + factors.nbytes > most:
            raise Declined(
                BUSY,
                f"Layer {layer} of the adapter needs {factors.nbytes / 1e6:.1f} MB; sessions and adapters take "
                f"{taken / 1e6:.1f} of {most / 1e6:.1f} MB. Try again soon, or give this node more memory.",
                retry_ms=_RETRY_MS,
            )
        self._make_room(most - taken - factors.nbytes)
        adapter.factors[layer] = factors

    def drop(self, name: str) -> None:
        """Sessions that run with it keep it."""
        self._known.pop(name, None)

    def of(self, name: str, first: int, last: int) -> Adapter | None:
        """The adapter of a session over the layers [first, last); None for the name "".

        Raises Declined `fenced`: it is not here (any more), or not whole.
        """
        if not name:
            return None
        adapter = self._known.get(name)
        if adapter is None:
            raise Declined(FENCED, f"The adapter {name} is not loaded here (any more).")
        for layer in adapter.layers:
            if first <= layer < last and layer not in adapter.factors:
                raise Declined(FENCED, f"Layer {layer} of the adapter {name} has not come.")
        return adapter
