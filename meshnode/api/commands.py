"""What the command line may ask a running node, answered in plain data (see `services/control.py`)."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Final

import psutil
import trio

from meshnode import __version__
from meshnode.api.control import Command, Json
from meshnode.core.clock import wall_ms
from meshnode.core.errors import Declined
from meshnode.node import Node
from meshnode.services.inference.origin import Receipt
from meshnode.services.inference.text import Question, Text
from protocols.advert.messages import Advert
from protocols.errors import LocalProtocolError
from protocols.ids import Cid, PeerId, short
from protocols.manifest.codec import open_manifest
from protocols.pipe.messages import Sampling

PATIENCE_SECONDS: Final = 10.0  # a mesh that is just starting gets this long before a question is refused
STATUS_VERSION: Final = 1  # of the JSON that `meshnode status --json` prints


class Orders:
    """The commands of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def commands(self) -> Mapping[str, Command]:
        return {
            "status": self._status,
            "ready": self._ready,
            "generate": self._generate,
            "announce": self._announce,
            "bring": self._bring,
            "pin": self._pin,
            "stop": self._stop,
        }

    def wording(self, sentence: str) -> str:
        """The sentence with the names of nodes beside their peer ids, which nobody can tell apart."""
        for peer, advert in self._node.directory.live().items():
            if advert.name:
                sentence = sentence.replace(peer, f"{advert.name} ({short(peer)})")
        return sentence

    async def _stop(self, _request: Json) -> AsyncGenerator[Json, None]:
        self._node.stopping.set()
        yield {"done": True}

    async def _ready(self, request: Json) -> AsyncGenerator[Json, None]:
        """Wait until a probe token has passed through the chain, or `seconds` are over."""
        seconds = request.get("seconds", 60)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= 86400:
            raise Declined("bad-request", f"seconds is {seconds!r}; it takes a number from 0 to 86400")
        with trio.move_on_after(seconds):
            await self._node.readiness.wait_ready()
        ready = self._node.readiness.now
        yield {"done": {"ready": ready.ready, "readiness": ready.sentence}}

    async def _announce(self, request: Json) -> AsyncGenerator[Json, None]:
        self._node.announce(Cid(str(request.get("manifest"))), str(request.get("variant")))
        yield {"done": True}

    async def _bring(self, request: Json) -> AsyncGenerator[Json, None]:
        """Fetch a manifest into the store, from members, guests or outside."""
        await self._node.content.fetch_block(Cid(str(request.get("manifest"))))
        yield {"done": True}

    async def _pin(self, request: Json) -> AsyncGenerator[Json, None]:
        """Have every file of one variant on this node, and keep it."""
        node, cid = self._node, Cid(str(request.get("manifest")))
        manifest = open_manifest(await node.content.fetch_block(cid))
        variant = manifest.variants.get(str(request.get("variant")))
        if variant is None:
            raise Declined("no-model", f"{manifest.name} has no variant {request.get('variant')!r}")
        groups = variant.groups(0, len(variant.layers))
        refs = {ref.cid: ref for ref in (*manifest.files.values(), variant.graph, *groups.values())}
        total, done = sum(ref.size for ref in refs.values()), 0
        node.store.pin(cid, cid)
        for ref in refs.values():
            yield {"fetched": done, "total": total}
            await node.content.fetch(ref.cid, ref.size)
            node.store.pin(ref.cid, cid)
            done += ref.size
        yield {"fetched": total, "total": total}
        yield {"done": {"bytes": total}}

    async def _generate(self, request: Json) -> AsyncGenerator[Json, None]:
        question = question_of(request)
        ready = self._node.readiness
        if not ready.now.ready:
            yield {"waiting": ready.now.sentence}
            with trio.move_on_after(PATIENCE_SECONDS):  # whatever is wrong then is said by the attempt itself
                await ready.wait_ready()
        tokens: list[int] = []
        texts: list[str] = []
        async with aclosing(self._node.answer(question)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Text):
                    texts.append(piece.text)
                    if piece.token >= 0:
                        tokens.append(piece.token)
                    yield {"text": piece.text, "token": piece.token}
                else:
                    yield {
                        "done": {
                            "text": "".join(texts),
                            "token_ids": tokens,
                            "prompt_token_ids": list(piece.prompt),
                            "reason": piece.reason,
                            **figures(piece),
                        }
                    }

    async def _status(self, _request: Json) -> AsyncGenerator[Json, None]:
        yield {"done": self.status()}

    def status(self) -> Json:
        """Everything that `meshnode status` shows. Sizes in bytes, times in milliseconds."""
        node = self._node
        live = node.directory.live()
        served = node.served()
        ready = node.readiness.now
        prediction = node.placement.prediction()
        stage = node.placement.engine()
        progress = node.placement.progress()
        store = node.store.usage()
        copies = node.replication.copies()
        members = node.membership.members()
        return {
            "version": STATUS_VERSION,
            "software": __version__,
            "peer": node.identity.peer_id,
            "pid": os.getpid(),
            "network": node.membership_file.network.name,
            "addresses": list(node.host.addresses),
            "uptime_s": round((wall_ms() - node.began_ms) / 1000, 1),
            "ready": ready.ready,
            "readiness": ready.sentence,
            "model": None
            if served is None
            else {
                "name": served.manifest.name,
                "version": served.manifest.version,
                "manifest": served.cid,
                "variant": served.variant,
                "layers": served.manifest.architecture.layers,
            },
            "prediction": "" if prediction is None else prediction.text,
            "me": self._line(live[node.identity.peer_id], members),
            "peers": [self._line(advert, members) for peer, advert in live.items() if peer != node.identity.peer_id],
            "progress": None if progress is None else dataclasses.asdict(progress),
            "sessions": node.generation.running,
            "rss_bytes": psutil.Process().memory_info().rss,
            "torch_imported": "torch" in sys.modules,
            "engine": None
            if stage is None
            else {
                "pid": stage.report.pid,
                "rss_bytes": stage.engine.rss_bytes,
                "weight_bytes": stage.report.weight_bytes,
            },
            "content": {
                "used_bytes": store.used_bytes,
                "quota_bytes": store.quota_bytes,
                "free_disk_bytes": store.free_disk_bytes,
                "fetched_bytes": node.content.bytes_fetched,
                "served_bytes": node.content.bytes_served,
                "bad_providers": dict(node.content.bad_providers()),
                "encrypted": node.config.content.encrypt,
                "guests": {peer: peer in node.host.guests for peer in node.external.configured},
                "published": 0 if node.daemon is None else len(node.daemon.published),
                "room_bytes": store.room_bytes,
                "visitors": len(node.external.came),
                "dht": None
                if node.dht is None
                else {
                    "peers": node.dht.known_peers,
                    "provided": sum(count > 0 for count in node.dht.provided.values()),
                },
                **self._tiers(),
            },
            "copies": None
            if copies is None or served is None
            else {
                "wanted": copies.wanted,
                "nodes": copies.nodes,
                "fewest": copies.fewest,
                "files": len(copies.of_file),
                "short": len(copies.short),
                "planned": copies.planned,
                "groups": self._copies_by_name(copies.of_file),
            },
            "health": [
                {"code": w.code, "severity": w.severity.name.lower(), "text": w.text} for w in node.health.current()
            ],
            "refusals": [
                {"at_ms": r.at_ms, "peer": r.peer, "code": r.code, "text": r.sentence, "by_us": r.by_us}
                for r in node.membership.refusals
            ],
            "unreachable": {
                str(who): why for who, why in (node.discovery.failures() | node.external.failures()).items()
            },
        }

    def _copies_by_name(self, of_file: Mapping[Cid, int]) -> dict[str, int]:
        """Copies of every file of the served model: "layer.7", "graph", "tokenizer.json"."""
        served = self._node.served()
        if served is None:
            return {}
        variant = served.manifest.variants[served.variant]
        groups = variant.groups(0, served.manifest.architecture.layers)
        named = {**groups, "graph": variant.graph, **served.manifest.files}
        return {name: of_file.get(file.cid, 0) for name, file in named.items()}

    def _tiers(self) -> Json:
        """Bytes of the served model by how far away they are: mapped by our engine, on our disk, elsewhere."""
        served = self._node.served()
        if served is None:
            return {"hot_bytes": 0, "warm_bytes": 0, "cold_bytes": 0}
        variant = served.manifest.variants[served.variant]
        every = {ref.cid: ref.size for ref in (variant.graph, *variant.groups(0, len(variant.layers)).values())}
        stage = self._node.placement.engine()
        mapped = {}
        if stage is not None and (stage.span.manifest, stage.span.variant) == (served.cid, served.variant):
            mapped = {ref.cid: ref.size for ref in variant.groups(stage.span.first, stage.span.last).values()}
        here = self._node.store.files()
        hot = sum(mapped.values())
        warm = sum(size for cid, size in every.items() if cid in here and cid not in mapped)
        return {"hot_bytes": hot, "warm_bytes": warm, "cold_bytes": sum(every.values()) - hot - warm}

    def _line(self, advert: Advert, members: Mapping[PeerId, Any]) -> Json:
        node = self._node
        peer = PeerId(advert.peer)
        serving = advert.serving
        us = node.host.round_trip_us(peer)
        return {
            "peer": peer,
            "name": advert.name,
            "connected": peer in node.host.peers,
            "roles": sorted(node.membership.roles_of(peer) or ()),
            "round_trip_ms": None if us is None else round(us / 1000, 2),
            "memory_bytes": advert.memory_bytes,
            "state": "idle" if serving is None else serving.state,
            "first": None if serving is None or serving.span is None else serving.span.first,
            "last": None if serving is None or serving.span is None else serving.span.last,
            "target": None
            if serving is None or serving.target is None
            else [serving.target.first, serving.target.last],
            "sessions": 0 if serving is None else serving.sessions,
            "layer_decode_us": advert.layer_decode_us,
            "layer_prefill_us": advert.layer_prefill_us,
            "age_s": node.directory.age_s(peer),
            "incarnation": advert.incarnation,
        }


def figures(receipt: Receipt) -> Json:
    """A receipt's figures in plain data."""
    return {
        "route": [{"peer": hop.peer, "first": hop.first, "last": hop.last} for hop in receipt.route],
        "ttft_ms": round(receipt.first_token_ms, 2),
        "decode_tok_s": round(receipt.decode_tokens_s, 2) if len(receipt.arrivals) > 1 else None,
        "hops": receipt.hops(),
        "return_ms": receipt.return_ms(),
    }


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


def question_of(request: Json) -> Question:
    """Read a question out of a request. Raises Declined `bad-request`."""

    def number(key: str, default: float, low: float, high: float) -> float:
        value = request.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise Declined(
                "bad-request", f"{key} is {value!r}; it takes a number from {_plain(low)} to {_plain(high)}"
            )
        return value

    turns, text, tokens = request.get("messages"), request.get("prompt"), request.get("token_ids")
    if turns is not None and (not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns)):
        raise Declined("bad-request", "messages is a list of {role, content}")
    if text is not None and not isinstance(text, str):
        raise Declined("bad-request", "prompt is a text")
    if tokens is not None and (
        not isinstance(tokens, list) or not all(isinstance(t, int) and 0 <= t < 1 << 24 for t in tokens)
    ):
        raise Declined("bad-request", "token_ids is a list of whole numbers")
    stop = request.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(s, str) for s in stop):
        raise Declined("bad-request", "stop is a list of texts")
    try:
        sampling = Sampling(
            seed=int(number("seed", 0, 0, (1 << 63) - 1)),
            temperature_milli=round(number("temperature", 0.0, 0, 10) * 1000),
            top_k=int(number("top_k", 0, 0, 1 << 20)),
            top_p_micro=max(1, round(number("top_p", 1.0, 0.000001, 1) * 1_000_000)),
            repetition_milli=round(number("repetition_penalty", 1.0, 0.1, 10) * 1000),
        )
    except LocalProtocolError as error:
        raise Declined("bad-request", str(error)) from error
    return Question(
        turns=None if turns is None else tuple(turns),
        text=text,
        tokens=None if tokens is None else tuple(tokens),
        max_tokens=int(number("max_tokens", 512, 1, 1 << 20)),
        sampling=sampling,
        stop=tuple(stop),
    )
