"""What Prometheus reads: the names are vLLM's with another prefix, so that panels made for it work here.

Labels come from bounded sets alone. docs/metrics.md lists every one; a test compares it with this file.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Final

import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Scope

from meshnode.api.asking import Event
from meshnode.api.messages import Answer, Piece, Status
from meshnode.services.inference.receipt import Waiting
from meshnode.services.inference.text import Started
from protocols.errors import MeshError

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MAX_STAGES: Final = 16  # that get a label of their own; further ones share the last

_FAST: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
_SLOW: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The figures of one node."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._answers(self.registry)
        self._node(self.registry)

    def _answers(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(f"meshnode_{name}", text, tuple(labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: Iterable[str] = ()) -> Histogram:
            return Histogram(f"meshnode_{name}", text, tuple(labels), buckets=buckets, registry=registry)

        self._responses = counter("http_responses_total", "Responses by route and status.", ("route", "status"))
        self._prompt = counter("prompt_tokens_total", "Tokens of the prompts that were answered.")
        self._asked_for = counter("prefix_cache_queries_total", "Tokens of prompts, kept or not.")
        self._hits = counter("prefix_cache_hits_total", "Of them, those that all stages had kept.")
        self._generated = counter("generation_tokens_total", "Tokens of answers.")
        self._succeeded = counter("request_success_total", "Questions answered.", ("finished_reason",))
        self._failed = counter("request_failure_total", "Questions that ended with an error.")
        self._left = counter("request_abandoned_total", "Questions whose client left.")
        self._first = histogram("time_to_first_token_seconds", "From the question to its first token.", _SLOW)
        self._between = histogram("inter_token_latency_seconds", "From one token to the next.", _FAST)
        self._whole = histogram("e2e_request_latency_seconds", "From the question to the end of its answer.", _SLOW)
        self._queued = histogram("request_queue_time_seconds", "Until every stage had taken the question.", _SLOW)
        self._prefill = histogram("request_prefill_time_seconds", "From then to the first token.", _SLOW)
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last.", _SLOW)
        self._stages = histogram(
            "stage_compute_time_seconds", "Computing of one step, median of an answer.", _FAST, ("stage",)
        )
        self._hops = histogram(
            "hop_network_time_seconds", "The way to a stage, median of an answer.", _FAST, ("stage",)
        )

    def _node(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
            return Gauge(f"meshnode_{name}", text, tuple(labels), registry=registry)

        self._running = gauge("num_requests_running", "Questions of this node that are being answered.")
        self._waiting = gauge("num_requests_waiting", "Questions that came by HTTP and wait for a stage.")
        self._ready = gauge("ready", "1 when a probe token has passed through the chain.")
        self._peers = gauge("peers", "Other nodes that are there.")
        self._connected = gauge("peers_connected", "Of them, those that this node is connected to.")
        self._serving = gauge("layers_served", "Layers that this node serves.")
        self._memory = gauge("memory_bytes", "Memory that this node offers for weights and sessions.")
        self._predicted = gauge("predicted_tokens_per_second", "Speed of one answer, as the plan says; 0: unknown.")
        self._rss = gauge("process_rss_bytes", "Memory of the node's process.")
        self._engine = gauge("engine_rss_bytes", "Memory of its engine.")
        self._kept = gauge("prefix_cache_bytes", "Keys and values of prompts that its engine has kept.")
        self._used = gauge("content_used_bytes", "Model files on this device.")
        self._quota = gauge("content_quota_bytes", "Most that they may take.")
        self._fetched = gauge("content_fetched_bytes", "Bytes of model files fetched since the start.")
        self._served = gauge("content_served_bytes", "Bytes of model files given to others since the start.")
        self._short = gauge("copies_short", "Files of the served model with too few copies.")
        self._warnings = gauge("health_warnings", "What is wrong now.", ("severity",))
        self._uptime = gauge("uptime_seconds", "Since the start.")

    def text(self, status: Status) -> bytes:
        """The page, with the node's state of this moment."""
        self._running.set(status.sessions)
        self._ready.set(status.ready)
        self._peers.set(len(status.peers))
        self._connected.set(sum(peer.connected for peer in status.peers))
        me = status.me
        self._serving.set(0 if me.first is None or me.last is None else me.last - me.first)
        self._memory.set(me.memory_bytes)
        self._predicted.set(status.predicted_tok_s)
        self._rss.set(status.rss_bytes)
        self._engine.set(0 if status.engine is None else status.engine.rss_bytes)
        self._kept.set(0 if status.engine is None else status.engine.kept_bytes)
        self._used.set(status.content.used_bytes)
        self._quota.set(status.content.quota_bytes)
        self._fetched.set(status.content.fetched_bytes)
        self._served.set(status.content.served_bytes)
        self._short.set(0 if status.copies is None else status.copies.short)
        for severity in ("high", "medium", "low"):
            self._warnings.labels(severity).set(sum(one.severity == severity for one in status.health))
        self._uptime.set(status.uptime_s)
        return generate_latest(self.registry)

    def responded(self, scope: Scope, status: int) -> None:
        """A response has begun. Paths that are no route share one label."""
        route = scope.get("meshnode.route", "none")
        self._responses.labels(route, str(status)).inc()

    async def measured(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """The same events, counted and timed."""
        began = trio.current_time()
        taken = first = last = None
        self._waiting.inc()
        try:
            async with aclosing(events):
                async for event in events:
                    now = trio.current_time()
                    match event:
                        case Waiting():
                            pass
                        case Started() if taken is None:
                            taken = now
                            self._waiting.dec()
                            self._queued.observe(now - began)
                        case Piece(token=token) if token >= 0:
                            if first is None or last is None:
                                first = now
                                self._first.observe(now - began)
                                self._prefill.observe(now - (taken or began))
                            else:
                                self._between.observe(now - last)
                            last = now
                        case Answer():
                            self._answered(event, now - began, 0.0 if first is None else now - first)
                    yield event
        except MeshError:
            self._failed.inc()
            raise
        except (trio.Cancelled, GeneratorExit):
            self._left.inc()
            raise
        finally:
            if taken is None:
                self._waiting.dec()

    def _answered(self, answer: Answer, whole_s: float, decode_s: float) -> None:
        self._prompt.inc(len(answer.prompt_token_ids))
        self._asked_for.inc(len(answer.prompt_token_ids))
        self._hits.inc(answer.receipt.cached_tokens)
        self._generated.inc(len(answer.token_ids))
        self._succeeded.labels("length" if answer.reason == "length" else "stop").inc()
        self._whole.observe(whole_s)
        self._decode.observe(decode_s)
        for index, hop in enumerate(answer.receipt.hops):
            stage = str(min(index, MAX_STAGES - 1))
            self._stages.labels(stage).observe(hop.compute_ms / 1000)
            self._hops.labels(stage).observe(hop.network_ms / 1000)
