"""enginewire: vectors, damage, and the two machines against the table in SPEC.md."""

from __future__ import annotations

import dataclasses
import re

import pytest

from protocols.codec import dumps
from protocols.enginewire import messages as wire
from protocols.enginewire.machine import ANSWERED_BY, ENGINE, NODE, EngineSide, NodeSide, State
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.pipe.messages import Chance, Prefix, Sampling
from tests.vectors import PROTOCOLS, Case, hold

S = bytes(range(16))
LOAD = wire.Load(
    number=1,
    kind="onnx",
    graph="/models/graph-int4.onnx",
    groups=(wire.GroupFile(name="layer.0", path="/models/a"), wire.GroupFile(name="embed", path="/models/b")),
    first=0,
    last=1,
    layers=30,
    hidden=576,
    kv_heads=3,
    head_dim=64,
    vocab=49152,
    context=8192,
    threads=1,
    max_sessions=8,
    max_kv_bytes=1 << 28,
    heads=9,
    graph_name="bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy",
)
SAMPLING = Sampling(seed=7, temperature_milli=700, top_k=40, top_p_micro=950_000, repetition_milli=1100)
OPEN = wire.Open(number=2, session=S, first=0, last=1, capacity=100, sampling=SAMPLING)
STEP = wire.Step(number=3, session=S, position=0, rows=5, sample=True, prefill=True)
CLOSE = wire.Close(number=4, session=S)
NAME = "bafyreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
ADAPT = wire.Adapt(number=5, adapter=NAME, first=0, last=1, rank=8, alpha=16, targets=("q_proj", "v_proj"))
LAYER = wire.AdapterLayer(number=6, adapter=NAME, layer=0)
DROP = wire.Drop(number=7, adapter=NAME)
REQUEST_SAMPLES: dict[str, wire.Request] = {
    "load": LOAD,
    "load of the null engine": dataclasses.replace(LOAD, kind="null", graph="", graph_name="", groups=()),
    "open": OPEN,
    "open, greedy": dataclasses.replace(OPEN, sampling=None),
    "open, pooled": dataclasses.replace(OPEN, sampling=None, pooled=True),
    "open, that goes on": dataclasses.replace(OPEN, drawn=3),
    "open, with an adapter": dataclasses.replace(OPEN, adapter=NAME),
    "open, with prefixes": dataclasses.replace(OPEN, prefixes=(Prefix(tokens=64, name=S),)),
    "step": STEP,
    "step with a mask": dataclasses.replace(STEP, mask=6144),
    "step, decode": dataclasses.replace(STEP, position=5, rows=1, prefill=False, sample=False),
    "close": CLOSE,
    "close and keep": dataclasses.replace(CLOSE, keep=True),
    "adapt": ADAPT,
    "layer of an adapter": LAYER,
    "drop": DROP,
}
ANSWER_SAMPLES: dict[str, wire.Answer] = {
    "loaded": wire.Loaded(
        number=1, load_ms=300, weight_bytes=22_737_280, decode_us=1350, prefill_us=760, confined=("memory",)
    ),
    "done": wire.Done(number=2),
    "done, with kept rows": wire.Done(number=2, kept_bytes=22_118_400),
    "opened": wire.Opened(number=2),
    "opened, with rows": wire.Opened(number=2, rows=1440, kept_bytes=22_118_400),
    "stepped": wire.Stepped(number=3, token=None, compute_us=1300),
    "stepped, token": wire.Stepped(number=3, token=42, compute_us=1300),
    "stepped, token and chances": wire.Stepped(
        number=3,
        token=42,
        compute_us=1300,
        chances=(Chance(token=42, nano_nats=693_147_181), Chance(token=7, nano_nats=0)),
    ),
    "refused": wire.Refused(number=3, code="busy", reason="All 8 sessions are taken.", retry_ms=1000),
    "refused, no retry": wire.Refused(number=3, code="fenced", reason="not open"),
    "failed": wire.Failed(number=1, reason="The graph is damaged."),
}


def decode(data: bytes) -> object:
    """A request or an answer: their tags do not overlap."""
    try:
        return wire.REQUESTS.decode(data)
    except RemoteProtocolError:
        return wire.ANSWERS.decode(data)


def test_vectors() -> None:
    cases = [Case(name, wire.REQUESTS.encode(message), message) for name, message in REQUEST_SAMPLES.items()]
    cases += [Case(name, wire.ANSWERS.encode(message), message) for name, message in ANSWER_SAMPLES.items()]
    bad = {
        "empty": b"",
        "not a map": dumps([1]),
        "no tag": dumps({1: 4, 2: S}),
        "unknown tag": dumps({0: 99, 1: 4, 2: S}),
        "missing number": dumps({0: 4, 2: S}),
        "short session": dumps({0: 4, 1: 4, 2: S[:15]}),
        "no rows": dumps({0: 3, 1: 3, 2: S, 3: 0, 4: 0, 5: True, 6: True}),
        "rows as a bool": dumps({0: 3, 1: 3, 2: S, 3: 0, 4: True, 5: True, 6: True}),
        "sample as a number": dumps({0: 3, 1: 3, 2: S, 3: 0, 4: 1, 5: 1, 6: True}),
        "capacity 0": dumps({0: 2, 1: 2, 2: S, 3: 0, 4: 1, 5: 0}),
        "rank 0": dumps({0: 5, 1: 5, 2: NAME, 3: 0, 4: 1, 5: 0, 6: 16, 7: ["q_proj"]}),
        "rank above the limit": dumps({0: 5, 1: 5, 2: NAME, 3: 0, 4: 1, 5: 65, 6: 16, 7: ["q_proj"]}),
        "eight targets": dumps({0: 5, 1: 5, 2: NAME, 3: 0, 4: 1, 5: 8, 6: 16, 7: ["q_proj"] * 8}),
        "unknown even key": dumps({0: 17, 1: 2, 8: 1}),
        "spelt-out default": dumps({0: 19, 1: 3, 2: "busy", 3: "no", 4: 0}),
        "long code": dumps({0: 19, 1: 3, 2: "b" * 17, 3: "no"}),
        "trailing byte": wire.REQUESTS.encode(CLOSE) + b"\0",
    }
    hold("enginewire", cases + [Case(name, data) for name, data in bad.items()], decode)


def test_the_largest_load_fits() -> None:
    groups = tuple(wire.GroupFile(name=f"layer.{i}", path="/" + "x" * 200) for i in range(wire.MAX_LAYERS + 2))
    assert len(wire.REQUESTS.encode(dataclasses.replace(LOAD, groups=groups))) <= wire.MAX_MESSAGE_BYTES


# ---------------------------------------------------------------- machines


def ready() -> NodeSide:
    node = NodeSide()
    node.ask(LOAD)
    node.answered(ANSWER_SAMPLES["loaded"])
    return node


def test_numbers_are_counted_by_the_machine() -> None:
    node = ready()
    first, second = node.ask(STEP), node.ask(CLOSE)
    assert (first.number, second.number) == (2, 3)
    assert node.waiting == 2
    assert node.answered(wire.Stepped(number=2, token=None, compute_us=1)) == first
    assert node.answered(wire.Done(number=3)) == second
    assert node.waiting == 0


@pytest.mark.parametrize(
    "request_", [OPEN, STEP, CLOSE, ADAPT, LAYER, DROP, LOAD], ids=lambda request: type(request).__name__
)
def test_one_load_and_nothing_before_it(request_: wire.Request) -> None:
    node, engine = NodeSide(), EngineSide()
    if request_ is LOAD:
        node.ask(LOAD)
        node.answered(ANSWER_SAMPLES["loaded"])
        engine.take(LOAD)
    state = "ready" if request_ is LOAD else "new"
    with pytest.raises(LocalProtocolError, match=f"to an engine that is {state}"):
        node.ask(request_)
    with pytest.raises(RemoteProtocolError, match=f"to an engine that is {state}"):
        engine.take(dataclasses.replace(request_, number=2 if request_ is LOAD else 1))
    if request_ is not LOAD:
        assert node.ask(LOAD).number == 1  # nothing had changed
        engine.take(LOAD)


def test_numbers_follow_each_other() -> None:
    engine = EngineSide()
    engine.take(LOAD)
    for number in (1, 3):
        with pytest.raises(RemoteProtocolError, match="2 is due"):
            engine.take(dataclasses.replace(CLOSE, number=number))
    engine.take(dataclasses.replace(CLOSE, number=2))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (wire.Done(number=3), "answered request 3, 2 is due"),
        (wire.Done(number=2), "answered a Step with Done"),
        (
            wire.Loaded(number=2, load_ms=1, weight_bytes=1, decode_us=1, prefill_us=1, confined=()),
            "answered a Step with Loaded",
        ),
    ],
)
def test_wrong_answers(answer: wire.Answer, words: str) -> None:
    node = ready()
    node.ask(STEP)
    with pytest.raises(RemoteProtocolError, match=words):
        node.answered(answer)
    node.answered(wire.Stepped(number=2, token=1, compute_us=1))  # nothing had changed


def test_an_answer_nobody_asked_for() -> None:
    with pytest.raises(RemoteProtocolError, match="nobody asked"):
        ready().answered(wire.Done(number=1))


def test_failed_is_the_end() -> None:
    node = NodeSide()
    node.ask(LOAD)
    node.answered(wire.Failed(number=1, reason="no"))
    assert node.state is State.ENDED
    with pytest.raises(LocalProtocolError, match="ended"):
        node.ask(OPEN)


def test_the_table_of_the_spec_is_the_machine() -> None:
    text = (PROTOCOLS / "enginewire" / "SPEC.md").read_text()
    section = text[text.index("## Behaviour") : text.index("## Validation")]
    rows = re.findall(r"^\| (new|loading|ready|ended) \| (\w+) \| (\w+) \|$", section, re.M)
    assert [(s.value, m.__name__, after.value) for (s, m), after in NODE.items()] == rows
    asked = {m for _, m in ENGINE}
    assert asked == set(wire.REQUESTS) == set(ANSWERED_BY)
    assert {a for kinds in ANSWERED_BY.values() for a in kinds} == set(wire.ANSWERS)
