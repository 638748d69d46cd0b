"""One trace of one answer, with spans of all nodes that took part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO

import pytest
import structlog
from trio.testing import MockClock

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otlp")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from meshnode.core import log
from meshnode.core.errors import Declined
from meshnode.otlp import OtelTracer, provider_of
from meshnode.sim.world import World
from tests.sim.test_nodes import library, mesh

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def logs() -> Iterator[StringIO]:
    """What nodes write as JSON."""
    before, out = structlog.get_config(), StringIO()
    log.set_up(level="debug", format="json", stream=out)
    yield out
    structlog.configure(**before)


async def traced(world: World) -> InMemorySpanExporter:
    """Three nodes that serve together; where their spans come together."""
    collector = InMemorySpanExporter()
    for device in world.add(3, memory="1.4MB"):
        provider = provider_of(device.name, device.peer_id)
        provider.add_span_processor(SimpleSpanProcessor(collector))
        device.tracer = OtelTracer(provider, lambda: world.wall() * 1_000_000)
    await world.start_all()
    await world.publish("n1")
    await world.until(world.all_ready)
    return collector


def node_of(span: ReadableSpan) -> str:
    return str(span.resource.attributes["host.name"])


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def children(spans: list[ReadableSpan], parent: ReadableSpan) -> list[ReadableSpan]:
    return [span for span in spans if span.parent is not None and span.parent.span_id == id_of(parent)]


async def test_one_trace_has_spans_of_all_nodes_with_the_right_parents(
    world: World, autojump_clock: MockClock
) -> None:
    collector = await traced(world)
    assert not collector.get_finished_spans(), "probes are no questions"
    answer = await library(world, "n2").generate([5, 6, 7], max_tokens=6, traceparent=f"00-{TRACE}-{SPAN}-01")
    await world.until(lambda: sum(span.name == "stage" for span in collector.get_finished_spans()) == 3)
    spans = list(collector.get_finished_spans())
    assert {span.context.trace_id for span in spans if span.context} == {int(TRACE, 16)}
    (question,) = (span for span in spans if span.name == "question")
    assert question.parent is not None and question.parent.span_id == int(SPAN, 16)
    assert node_of(question) == "n2"
    below = children(spans, question)
    assert sorted(span.name for span in below) == ["decode", "prefill", "queue", "stage", "stage", "stage"]
    stages = [span for span in below if span.name == "stage"]
    assert {node_of(span) for span in stages} == {"n1", "n2", "n3"}
    hops = {(stage.peer, stage.first, stage.last) for stage in answer.receipt.route}
    assert {tuple((s.attributes or {})[k] for k in ("peer", "first", "last")) for s in stages} == hops
    for stage in stages:
        parts = children(spans, stage)
        assert sorted(part.name for part in parts) == ["decode", "prefill", "queue"]
        assert {node_of(part) for part in parts} == {node_of(stage)}
        assert stage.attributes is not None and stage.attributes["rows"] == 3 + 5, "the prompt, and all but one token"
    assert len(spans) == 1 + 6 + 3 * 3
    for span in spans:
        assert span.start_time is not None and span.end_time is not None and span.start_time <= span.end_time


async def test_what_a_client_does_not_want_kept_is_not_kept(world: World, autojump_clock: MockClock) -> None:
    collector = await traced(world)
    await library(world, "n1").generate([5, 6, 7], max_tokens=2, traceparent=f"00-{TRACE}-{SPAN}-00")
    assert not collector.get_finished_spans()


async def test_a_question_that_fails_says_why(world: World, autojump_clock: MockClock) -> None:
    collector = await traced(world)
    with pytest.raises(Declined, match="prompt has"):
        await library(world, "n1").generate([5] * 5000, max_tokens=2)
    (question,) = (span for span in collector.get_finished_spans() if span.name == "question")
    assert question.parent is None
    assert not question.status.is_ok and "prompt has 5000 tokens" in str(question.status.description)


async def test_log_lines_of_all_nodes_have_the_id_of_the_request(
    world: World, autojump_clock: MockClock, logs: StringIO
) -> None:
    """Also where nobody keeps spans."""
    await mesh(world)
    begin = logs.tell()
    await library(world, "n3").generate([5, 6, 7], max_tokens=4, traceparent=f"00-{TRACE}-{SPAN}-01")
    await library(world, "n3").generate([5, 6, 7], max_tokens=4)

    def ended_lines() -> list[dict[str, str]]:
        lines = [json.loads(line) for line in logs.getvalue()[begin:].splitlines()]
        return [line for line in lines if line["event"] == "session.ended" and "request" in line]

    await world.until(lambda: len(ended_lines()) == 6)
    ended = ended_lines()
    assert {line["node"] for line in ended if line["request"] == TRACE} == {"n1", "n2", "n3"}
    (other,) = {line["request"] for line in ended} - {TRACE}
    assert len(other) == 32
