"""Traces: what a `traceparent` may be, spans cut into phases, and the collector's extra."""

from __future__ import annotations

import gzip
import sys
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from meshnode.core.errors import BadRequest, ConfigError
from meshnode.core.tracing import Attribute, NoTracer, Phases, Span, TraceContext, read_traceparent, unsampled
from meshnode.text.question import question
from protocols.ids import PeerId
from tests.adverts import peer_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PEER = PeerId(peer_of(1))


def test_a_traceparent_there_and_back() -> None:
    """The example of the W3C recommendation."""
    place = read_traceparent(f" 00-{TRACE}-{SPAN}-01 ")
    assert place == TraceContext(bytes.fromhex(TRACE), bytes.fromhex(SPAN), sampled=True)
    assert place.traceparent == f"00-{TRACE}-{SPAN}-01"
    quiet = read_traceparent(f"00-{TRACE}-{SPAN}-00")
    assert quiet is not None and not quiet.sampled and quiet.traceparent.endswith("-00")
    later = read_traceparent(f"cc-{TRACE}-{SPAN}-03-what-comes-later")
    assert later == place, "fields of later versions are passed over"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"01-{TRACE}-{SPAN}-01-" + "a" * 600,
    ],
)
def test_what_is_no_traceparent_is_no_trace(text: str) -> None:
    assert read_traceparent(text) is None


def test_in_the_library_it_is_an_option() -> None:
    assert question("hello", {"traceparent": f"00-{TRACE}-{SPAN}-01"}).traceparent
    assert "traceparent" not in question("hello").as_json()
    with pytest.raises(BadRequest, match="traceparent is 'nonsense'"):
        question("hello", {"traceparent": "nonsense"})


class Told:
    """Writes down what begins and ends."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def begin(self, name: str, parent: TraceContext | None, **attributes: Attribute) -> Span:
        self.lines.append(f"+{name}")
        lines = self.lines

        class One:
            context = TraceContext(b"t" * 16, name.encode().ljust(8, b"-"))

            def end(self, failed: str = "", **attributes: Attribute) -> None:
                lines.append(f"-{name}{failed and ' ' + failed}")

        return One()


def test_a_phase_ends_where_the_next_one_begins() -> None:
    told = Told()
    phases = Phases(told, "whole", None)
    for name in ("queue", "queue", "decode", "", "decode"):
        phases.enter(name)
    phases.end("broken")
    assert told.lines == [
        *("+whole", "+queue", "-queue", "+decode", "-decode", "+decode", "-decode"),
        "-whole broken",
    ]


def test_who_keeps_nothing_passes_on_where_a_trace_comes_from() -> None:
    place = unsampled()
    assert Phases(NoTracer(), "whole", place).context == place
    assert Phases(NoTracer(), "whole", None).context is None
    assert not place.sampled


def test_without_the_extra_the_setting_is_refused_with_the_command_that_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from meshnode.otlp import open_tracer

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with ExitStack() as stack, pytest.raises(ConfigError, match=r"pip install 'meshnode\[otlp\]'"):
        open_tracer("http://127.0.0.1:4318", "ann", PEER, stack)


def test_spans_reach_a_collector() -> None:
    """A collector that takes OTLP over HTTP: what it gets is a request of the protocol, with our spans in it."""
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra otlp")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    from meshnode.otlp import open_tracer

    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            got.append((self.path, gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            with ExitStack() as stack:
                tracer = open_tracer(f"http://127.0.0.1:{server.server_port}", "ann", PEER, stack)
                span = tracer.begin("question", read_traceparent(f"00-{TRACE}-{SPAN}-01"), rows=3)
                span.end("it broke")
        finally:
            server.shutdown()
    (path, data) = got[0]
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(data).resource_spans
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.instance.id"] == PEER
    (sent,) = resource.scope_spans[0].spans
    assert (sent.name, sent.trace_id.hex(), sent.parent_span_id.hex()) == ("question", TRACE, SPAN)
    assert sent.status.message == "it broke" and sent.attributes[0].value.int_value == 3
