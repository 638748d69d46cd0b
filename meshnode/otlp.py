"""Spans into an OpenTelemetry collector: the extra `meshnode[otlp]`, imported only where `trace.otlp` is set."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from meshnode.core.errors import ConfigError
from meshnode.core.tracing import Attribute, NoTracer, Span, TraceContext, Tracer
from protocols.ids import PeerId

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as SdkSpan

SEND_S: Final = 5.0  # for one batch; also what the end of the node waits for a collector that is gone
WAITING: Final = 2048  # spans; further ones are dropped


def open_tracer(url: str, name: str, peer: PeerId, stack: ExitStack) -> Tracer:
    """A tracer that sends to the collector at `url`; what waits is sent when `stack` closes.

    Raises ConfigError: the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"trace.otlp is set, but what sends traces is not installed ({error.name} is missing); install it with "
            "pip install 'meshnode[otlp]', or remove the setting"
        ) from error
    provider = provider_of(name, peer)
    exporter = OTLPSpanExporter(f"{url.rstrip('/')}/v1/traces", timeout=SEND_S)
    provider.add_span_processor(
        BatchSpanProcessor(exporter, max_queue_size=WAITING, export_timeout_millis=SEND_S * 1000)
    )
    stack.callback(provider.shutdown)
    return OtelTracer(provider)


def provider_of(name: str, peer: PeerId) -> TracerProvider:
    """What spans of a node are made by, without anybody who takes them yet."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    from meshnode import __version__

    about = {
        "service.name": "meshnode",
        "service.version": __version__,
        "service.instance.id": peer,
        "host.name": name,
    }
    return TracerProvider(sampler=ALWAYS_ON, resource=Resource.create(about), shutdown_on_exit=False)


class OtelTracer:
    """Spans of the OpenTelemetry SDK."""

    def __init__(self, provider: TracerProvider, now_ns: Callable[[], int] = time.time_ns) -> None:
        """`now_ns`: UTC nanoseconds."""
        self._tracer = provider.get_tracer("meshnode")
        self._now_ns = now_ns

    def begin(self, name: str, parent: TraceContext | None, **attributes: Attribute) -> Span:
        """See `Tracer`. Of a trace that is not sampled nothing is kept."""
        from opentelemetry.context import Context
        from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

        if parent is not None and not parent.sampled:
            return NoTracer().begin(name, parent)
        context = Context()
        if parent is not None:
            place = SpanContext(
                trace_id=int.from_bytes(parent.trace_id, "big"),
                span_id=int.from_bytes(parent.span_id, "big"),
                is_remote=True,
                trace_flags=TraceFlags(TraceFlags.SAMPLED),
            )
            context = set_span_in_context(NonRecordingSpan(place), context)
        span = self._tracer.start_span(name, context, attributes=dict(attributes), start_time=self._now_ns())
        return _OtelSpan(span, self._now_ns)


class _OtelSpan:
    def __init__(self, span: SdkSpan, now_ns: Callable[[], int]) -> None:
        self._span = span
        self._now_ns = now_ns

    @property
    def context(self) -> TraceContext | None:
        own = self._span.get_span_context()
        return TraceContext(own.trace_id.to_bytes(16, "big"), own.span_id.to_bytes(8, "big"))

    def end(self, failed: str = "", **attributes: Attribute) -> None:
        from opentelemetry.trace import Status, StatusCode

        if not self._span.is_recording():
            return
        self._span.set_attributes(dict(attributes))
        if failed:
            self._span.set_status(Status(StatusCode.ERROR, failed))
        self._span.end(end_time=self._now_ns())
