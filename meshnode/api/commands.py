"""What a running node can be asked, in plain data: the table behind the control socket and the library."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Final

import trio

from meshnode.api.messages import Answer, Json, Receipt, Stage, StageTimes, read
from meshnode.api.question import Question, read_question
from meshnode.api.releases import check_variant, find_release
from meshnode.api.status import status_of
from meshnode.core.errors import BadRequest, ModelError
from meshnode.node import Node
from meshnode.services.inference import receipt, text
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, Cid, cid_codec, short
from protocols.manifest.codec import open_manifest
from protocols.pipe.messages import Sampling

MAX_WAIT_S: Final = 86_400.0


class Commands:
    """The commands of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.table: Final = {
            "status": self._status,
            "ready": self._ready,
            "generate": self._generate,
            "serve": self._serve,
            "fetch-manifest": self._fetch_manifest,
            "pin": self._pin,
            "stop": self._stop,
        }

    def name_peers(self, sentence: str) -> str:
        """The sentence with the names of nodes beside their peer ids, which nobody can tell apart."""
        for peer, advert in self._node.directory.live().items():
            if advert.name:
                sentence = sentence.replace(peer, f"{advert.name} ({short(peer)})")
        return sentence

    async def _status(self, _request: Json) -> AsyncGenerator[Json, None]:
        yield {"done": status_of(self._node).as_json()}

    async def _ready(self, request: Json) -> AsyncGenerator[Json, None]:
        """Wait until a probe token has passed through the chain, or `seconds` are over."""
        seconds = request.get("seconds", 60)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= MAX_WAIT_S:
            raise BadRequest(f"seconds is {seconds!r}; it takes a number from 0 to {MAX_WAIT_S:.0f}")
        with trio.move_on_after(seconds):
            await self._node.readiness.wait_ready()
        ready = self._node.readiness.now
        yield {"done": {"ready": ready.ready, "readiness": ready.sentence}}

    async def _generate(self, request: Json) -> AsyncGenerator[Json, None]:
        question = read_question(request)
        tokens: list[int] = []
        texts: list[str] = []
        async with aclosing(self._node.text.answer(_in_tokens(question, self._node.parts.rng))) as pieces:
            async for piece in pieces:
                if isinstance(piece, text.Waiting):
                    yield {"waiting": piece.why}
                elif isinstance(piece, text.Text):
                    texts.append(piece.text)
                    if piece.token >= 0:
                        tokens.append(piece.token)
                    yield {"text": piece.text, "token": piece.token}
                else:
                    answer = Answer(
                        text="".join(texts),
                        reason=piece.reason,
                        token_ids=tuple(tokens),
                        prompt_token_ids=piece.prompt,
                        receipt=_receipt(piece),
                    )
                    yield {"done": answer.as_json()}

    async def _serve(self, request: Json) -> AsyncGenerator[Json, None]:
        """Have the network serve a model that this node knows."""
        node, wanted = self._node, str(request.get("model"))
        cid, manifest, before = find_release(node.database, node.store, wanted)
        variant = str(request.get("variant") or before or manifest.smallest_variant())
        check_variant(manifest, variant)
        node.releases.announce(cid, variant)
        yield {"done": True}

    async def _fetch_manifest(self, request: Json) -> AsyncGenerator[Json, None]:
        """Fetch a manifest into the store, from members, IPFS peers or fallback sources."""
        await self._node.content.block(_manifest_cid(request))
        yield {"done": True}

    async def _pin(self, request: Json) -> AsyncGenerator[Json, None]:
        """Have every file of one variant on this node, and keep it."""
        node, cid = self._node, _manifest_cid(request)
        try:
            manifest = open_manifest(await node.content.block(cid))
        except RemoteProtocolError as error:
            raise ModelError(f"{cid} is not the manifest of a model: {error}") from error
        name = str(request.get("variant"))
        check_variant(manifest, name)
        refs = manifest.files_of(name)
        total, done = sum(ref.size for ref in refs), 0
        node.store.pin(cid, cid)
        for ref in refs:
            yield {"fetched": done, "total": total}
            await node.content.fetch(ref)
            node.store.pin(ref.cid, cid)
            done += ref.size
        yield {"fetched": total, "total": total}
        yield {"done": {"bytes": total}}

    async def _stop(self, _request: Json) -> AsyncGenerator[Json, None]:
        self._node.stopping.set()
        yield {"done": True}


def _manifest_cid(request: Mapping[str, Any]) -> Cid:
    cid = request.get("manifest")
    try:
        if isinstance(cid, str) and cid_codec(cid) == DAG_CBOR:
            return Cid(cid)
    except RemoteProtocolError:
        pass
    raise BadRequest(f"manifest is {cid!r}; it takes the CID of a manifest, which begins with bafyrei")


def _in_tokens(question: Question, rng: random.Random) -> text.Question:
    """As the stages take it: whole numbers, so that every node computes the same bytes."""
    return text.Question(
        turns=question.messages,
        text=question.prompt,
        tokens=question.token_ids,
        max_tokens=question.max_tokens,
        sampling=Sampling(
            seed=rng.getrandbits(62) if question.seed is None else question.seed,
            temperature_milli=round(question.temperature * 1000),
            top_k=question.top_k,
            top_p_micro=max(1, round(question.top_p * 1_000_000)),
            repetition_milli=round(question.repetition_penalty * 1000),
        ),
        stop=question.stop,
    )


def _receipt(figures: receipt.Receipt) -> Receipt:
    return Receipt(
        route=tuple(Stage(peer=hop.peer, first=hop.first, last=hop.last) for hop in figures.route),
        ttft_ms=round(figures.first_token_ms, 2),
        decode_tok_s=round(figures.decode_tokens_s, 2) if len(figures.arrivals) > 1 else None,
        hops=tuple(read(StageTimes, hop) for hop in figures.hops()),
        return_ms=figures.return_ms(),
    )
