"""What the HTTP door needs of a node."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from meshnode.api.asking import Event, ask, embed, judge, name_peers
from meshnode.api.duties import obey
from meshnode.api.messages import DutyStatus, Embedding, Judgement, Status
from meshnode.api.status import status_of
from meshnode.api.upstream import VARIANT, ask_upstream
from meshnode.core.clock import monotonic
from meshnode.core.signal import Watch
from meshnode.http.shorter import Shorter
from meshnode.node import Node
from meshnode.state.audit import Audit
from meshnode.text.question import Question


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A model that can be asked."""

    name: str
    version: str
    manifest: str  # CID
    variant: str
    family: str
    context: int  # tokens
    hidden: int
    layers: int
    size_bytes: int  # of its weights
    created_s: int
    upstream: str = ""  # who offers it from a server of its own; empty: the mesh computes it


class Door(Protocol):
    """A node, as the dialects see it."""

    @property
    def audit(self) -> Audit:
        """Where is noted what is asked."""

    def models(self) -> Sequence[Offered]:
        """Those that are served now; none while there is none."""

    def why_no_model(self) -> str: ...

    def ask(self, question: Question) -> AsyncGenerator[Event, None]:
        """See `asking.ask`."""

    def ask_upstream(self, model: str, question: Question) -> AsyncGenerator[Event, None]:
        """See `upstream.ask_upstream`."""

    async def embed(self, text: str | Sequence[int], adapter: str | None) -> Embedding:
        """See `asking.embed`."""

    async def count(self, question: Question) -> int:
        """Tokens of a question. Raises what `TextService.count` raises."""

    def judge(self, answer: Any, correct: Any, label: Any) -> Judgement:
        """See `asking.judge`."""

    def obey(self, order: str, seconds: Any) -> DutyStatus:
        """See `duties.obey`."""

    def name_peers(self, sentence: str) -> str:
        """See `asking.name_peers`."""

    def status(self) -> Status: ...

    async def changed(self) -> None:
        """Until `status` may say something else, beside figures that change all the time."""

    @property
    def ready(self) -> tuple[bool, str]:
        """Whether a probe token has passed through the chain, and a sentence about it."""


class NodeDoor:
    """Implements `Door` with a running node."""

    def __init__(self, node: Node, api_url: str) -> None:
        self._node = node
        self._api_url = api_url
        self._shorter = Shorter(monotonic)

    @property
    def audit(self) -> Audit:
        """See Door."""
        return self._node.parts.audit

    def models(self) -> Sequence[Offered]:
        """See Door."""
        release, offers = self._node.releases.current, tuple(self._upstream())
        if release is None:
            return offers
        manifest, shape = release.manifest, release.manifest.architecture
        return (
            Offered(
                name=manifest.name,
                version=manifest.version,
                manifest=release.cid,
                variant=release.variant_name,
                family=shape.family,
                context=shape.context,
                hidden=shape.hidden,
                layers=shape.layers,
                size_bytes=release.variant.span_bytes(0, shape.layers),
                created_s=manifest.created_ms // 1000,
            ),
            *offers,
        )

    def _upstream(self) -> Iterator[Offered]:
        live = self._node.directory.live()
        for model, peers in self._node.upstream.offers().items():
            yield Offered(
                name=model,
                version="",
                manifest="",
                variant=VARIANT,
                family="",
                context=0,
                hidden=0,
                layers=0,
                size_bytes=0,
                created_s=0,
                upstream=" and ".join(live[peer].name or peer for peer in peers if peer in live),
            )

    def why_no_model(self) -> str:
        """See Door."""
        return self._node.releases.why_none

    def ask(self, question: Question) -> AsyncGenerator[Event, None]:
        """See Door."""
        release = self._node.releases.current
        context = question.max_tokens if release is None else release.manifest.architecture.context
        return self._shorter.ask(partial(ask, self._node), question, context)

    def ask_upstream(self, model: str, question: Question) -> AsyncGenerator[Event, None]:
        """See Door."""
        return ask_upstream(self._node, model, question)

    async def embed(self, text: str | Sequence[int], adapter: str | None) -> Embedding:
        """See Door."""
        return await embed(self._node, text, adapter=adapter)

    async def count(self, question: Question) -> int:
        """See Door."""
        return await self._node.text.count(question)

    def judge(self, answer: Any, correct: Any, label: Any) -> Judgement:
        """See Door."""
        return judge(self._node, answer, correct, label)

    def obey(self, order: str, seconds: Any) -> DutyStatus:
        """See Door."""
        return obey(self._node, order, seconds)

    def name_peers(self, sentence: str) -> str:
        """See Door."""
        return name_peers(self._node, sentence)

    def status(self) -> Status:
        """See Door."""
        return status_of(self._node, self._api_url)

    async def changed(self) -> None:
        """See Door."""
        await Watch(self._node.directory.changes, self._node.readiness.changes, self._node.releases.changes).next()

    @property
    def ready(self) -> tuple[bool, str]:
        """See Door."""
        if self._node.releases.current is None:
            return False, self._node.releases.why_none
        return self._node.readiness.now.ready, self._node.readiness.now.sentence
