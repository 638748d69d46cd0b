"""Whatever a network does to the messages of a session, its answer is right or it fails with a reason.

A chain of real machines with an engine of plain arithmetic; the messages between them lie in a bag from which
hypothesis takes them in any order, loses or repeats them, and to which it adds lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import RemoteProtocolError
from protocols.pipe import origin as pipe
from protocols.pipe.messages import (
    Chance,
    Close,
    Hop,
    HopTime,
    Message,
    Open,
    Opened,
    Pooled,
    Prefix,
    Refused,
    Sampling,
    Step,
    Token,
)
from protocols.pipe.stage import Ran, StageSession, StageState
from tests.wire import messages

S = bytes(16)
EOS = 3
VOCABULARY = 40
TIME = HopTime(network_us=1, queue_us=2, compute_us=3)

Rows = tuple[int, ...]


def mix(layer: int, rows: Sequence[int]) -> int:
    """What a toy stage makes of its last row: it depends on every row before, and on their order."""
    value = 17 * (layer + 1)
    for row in rows:
        value = (value * 31 + row + 7) % 1_000_003
    return value


def answer_of(prompt: Rows, spans: int, most: int) -> list[int]:
    """The answer of one process that holds every stage."""
    text, out = list(prompt), list[int]()
    while len(out) < most and (not out or out[-1] != EOS):
        rows: Sequence[int] = text
        for layer in range(spans):
            rows = [mix(layer, rows[: i + 1]) for i in range(len(rows))]
        out.append(rows[-1] % VOCABULARY)
        text.append(out[-1])
    return out


def inputs_of(prompt: Rows, index: int) -> list[int]:
    """The rows that come into a stage."""
    rows: Sequence[int] = prompt
    for layer in range(index):
        rows = [mix(layer, rows[: i + 1]) for i in range(len(rows))]
    return list(rows)


@dataclass
class Node:
    """A stage with its engine: rows by position."""

    machine: StageSession
    rows: list[int] = field(default_factory=list)

    def run(self, step: Step, body: Rows) -> tuple[int | None, Rows]:
        self.rows[step.position :] = body
        out = tuple(
            mix(self.machine.opening.index, self.rows[: i + 1])
            for i in range(step.position, step.position + step.rows)
        )
        if not self.machine.is_last:
            return None, out
        return (out[-1] % VOCABULARY if step.sample else None), ()


class World:
    """One origin, its stages, and a bag of messages under way: (from, to, message, body)."""

    def __init__(self, stages: int, prompt: Rows, cuts: Sequence[int], most: int, kept: Sequence[int] = ()) -> None:
        """`kept`: rows of the prompt that each stage has of an earlier session."""
        self.route = tuple(Hop(peer=f"n{i}", incarnation=1, first=i, last=i + 1) for i in range(stages))
        self.task = pipe.Task(
            manifest="m",
            variant="v",
            prompt=prompt,
            chunks=tuple(cuts),
            max_tokens=most,
            eos=frozenset({EOS}),
            sampling=Sampling(seed=1),
            prefixes=tuple(Prefix(tokens=n, name=bytes([n] * 16)) for n in sorted({*kept} - {0})),
        )
        self.kept = dict(zip((hop.peer for hop in self.route), kept, strict=False))
        self.attempt = 1
        self.origin = pipe.Origin(session=S, attempt=1, us="me", route=self.route, task=self.task)
        self.prompt = prompt
        self.right = answer_of(prompt, stages, most)
        self.nodes: dict[str, Node] = {}
        self.bag: list[tuple[str, str, Message, Rows]] = []
        self.tokens: list[int] = []
        self.end: pipe.Finished | pipe.Failed | None = None
        self.now = 0.0

    def go_on(self, lost: set[int]) -> None:
        """Begin the next attempt, with other nodes in the places of those that are lost."""
        self.attempt += 1
        self.route = tuple(
            replace(hop, peer=f"{hop.peer}'") if index in lost else hop for index, hop in enumerate(self.route)
        )
        self.origin = pipe.Origin(
            session=S,
            attempt=self.attempt,
            us="me",
            route=self.route,
            task=self.task,
            drawn=tuple(self.tokens),
        )
        self.end = None
        self.tell(pipe.Begin())

    def tell(self, event: pipe.OriginEvent) -> None:
        """Give the origin an event and see that it ends once."""
        before, deadline = self.origin.state, self.origin.deadline
        try:
            effects = self.origin.handle(event, self.now)
        except RemoteProtocolError:
            assert isinstance(event, pipe.Received)
            assert (self.origin.state, self.origin.deadline) == (before, deadline), "an error changed something"
            return
        if before is pipe.OriginState.CLOSED:
            assert effects == ()
            return
        assert (self.origin.deadline is None) == (self.origin.state is pipe.OriginState.CLOSED)
        for effect in effects:
            self.perform(effect)
        ended = [effect for effect in effects if isinstance(effect, pipe.Finished | pipe.Failed)]
        assert (self.origin.state is pipe.OriginState.CLOSED) == bool(ended)
        if ended:
            assert ended == [effects[-1]], "the end is the last effect, once"
            closed = [e.peer for e in effects if isinstance(e, pipe.Send) and isinstance(e.message, Close)]
            assert closed == list(self.origin.peers), "every stage hears of the end"

    def perform(self, effect: pipe.OriginEffect) -> None:
        match effect:
            case pipe.Send(peer, message, body):
                self.bag.append(("me", peer, message, body))
            case pipe.Emit(token, position, _):
                assert self.end is None
                assert position == len(self.prompt) + len(self.tokens), "twice, or out of order"
                self.tokens.append(token)
            case pipe.Finished() | pipe.Failed():
                assert self.end is None
                self.end = effect

    def deliver(self, sender: str, receiver: str, message: Message, body: Rows) -> None:
        if receiver == "me":
            if isinstance(message, Opened | Refused | Token | Pooled):
                self.tell(pipe.Received(sender, message))
            return
        node = self.nodes.get(receiver)
        if isinstance(message, Open) and (node is None or node.machine.opening.attempt < message.attempt):
            node = self.nodes[receiver] = Node(StageSession(message, receiver))
            kept = self.kept.get(receiver, 0)
            node.rows = inputs_of(self.prompt[:kept], message.index)
            self.bag.append((receiver, sender, node.machine.opened(kept), ()))
        elif isinstance(message, Close) and node is not None and node.machine.may_close(sender):
            if message.attempt == node.machine.opening.attempt:
                node.machine.close()
        elif isinstance(message, Step) and node is not None:
            self.step(node, sender, message, body)

    def step(self, node: Node, sender: str, step: Step, body: Rows) -> None:
        us = node.machine.hop.peer
        try:
            run = node.machine.take(sender, step)
        except RemoteProtocolError as error:
            assert node.machine.state is StageState.OPEN
            origin, no = node.machine.refusal("fenced", str(error))
            self.bag.append((us, origin, no, ()))
            return
        if not run:
            return
        assert step.position <= len(node.rows), "a gap was let through"
        assert step.position + step.rows <= node.machine.opening.capacity
        token, rows = node.run(step, body)
        onward = node.machine.ran(Ran(step, token, TIME))
        if onward is not None:
            self.bag.append((us, onward[0], onward[1], rows))

    def pass_time(self) -> None:
        """Until the end: the origin is woken at its deadline, and nothing arrives any more."""
        for _ in range(3):
            if self.origin.deadline is not None:
                self.now = self.origin.deadline
                self.tell(pipe.Expired())
        assert self.origin.state is pipe.OriginState.CLOSED
        assert self.end is not None


@st.composite
def worlds(draw: st.DrawFn) -> World:
    prompt = tuple(draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6)))
    cut = draw(st.integers(1, len(prompt)))
    cuts = (cut, len(prompt) - cut) if cut < len(prompt) else (cut,)
    stages = draw(st.integers(1, 5))
    counts = st.one_of(st.just(0), st.integers(0, len(prompt)), st.just(len(prompt)))
    kept = draw(st.lists(counts, min_size=stages, max_size=stages))
    world = World(stages, prompt, cuts, draw(st.integers(1, 4)), kept)
    world.tell(pipe.Begin())
    return world


@settings(max_examples=100)
@given(worlds())
def test_in_order_the_answer_is_that_of_one_process(world: World) -> None:
    while world.bag:
        world.deliver(*world.bag.pop(0))
    assert world.tokens == world.right
    assert world.end == pipe.Finished("eos" if world.tokens[-1] == EOS else "length")
    assert all(node.machine.state is StageState.CLOSED for node in world.nodes.values())


@settings(max_examples=200)
@given(worlds(), st.data())
def test_an_answer_goes_on_as_it_would_have_whoever_is_lost_and_when(world: World, data: st.DataObject) -> None:
    """Stages are lost one after the other and together, in an opening, a prompt, a replay or between two tokens.

    What older attempts have sent arrives late, and in any order; that of the present one in order, as pipes keep it.
    """
    losses = data.draw(st.integers(1, 4))
    old: list[tuple[str, str, Message, Rows]] = []
    while world.end is None or isinstance(world.end, pipe.Failed):
        deed = data.draw(st.sampled_from(("deliver", "deliver", "deliver", "deliver", "late", "gone")))
        if deed == "gone" and losses:
            losses -= 1
            lost = data.draw(st.sets(st.integers(0, len(world.route) - 1), min_size=1))
            world.tell(pipe.PeerGone(world.route[min(lost)].peer, "lost"))
            assert isinstance(world.end, pipe.Failed)
            for index in lost:
                world.nodes.pop(world.route[index].peer, None)
            old += world.bag
            world.bag = []
            world.go_on(lost)
        elif deed == "late" and old:
            world.deliver(*old.pop(data.draw(st.integers(0, len(old) - 1))))
        elif world.bag:
            world.deliver(*world.bag.pop(0))
    assert world.tokens == world.right


@settings(max_examples=200)
@given(worlds(), st.data())
def test_any_order_loss_and_repetition(world: World, data: st.DataObject) -> None:
    for _ in range(40):
        if not world.bag:
            break
        deed = data.draw(st.sampled_from(("deliver", "deliver", "deliver", "deliver", "repeat", "lose", "late")))
        index = data.draw(st.integers(0, len(world.bag) - 1)) if deed != "deliver" else 0
        letter = world.bag[index]
        if deed != "repeat":
            world.bag.pop(index)
        if deed != "lose":
            world.deliver(*letter)
        world.now += 0.1
    world.pass_time()
    assert world.tokens == world.right[: len(world.tokens)]
    assert isinstance(world.end, pipe.Failed) or world.tokens == world.right


def lie(cls: type[Any], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(cls, session=st.just(S), attempt=st.integers(0, 2), **fields)


NOW = st.just(0)
INDICES, POSITIONS, HOPS = st.integers(0, 7), st.integers(0, 12), st.integers(0, 6).map(lambda n: (TIME,) * n)
CODES = st.sampled_from(("busy", "lost", "fenced", "timeout", ""))
ROWS = st.integers(1, 12)
CHANCES = st.lists(st.builds(Chance, token=st.integers(0, 9), nano_nats=NOW), max_size=3).map(tuple)
LIES = st.one_of(
    lie(Opened, index=INDICES, kept=st.integers(0, 7)),
    lie(Refused, index=INDICES, code=CODES, reason=st.text(max_size=5)),
    lie(Token, position=POSITIONS, token=st.integers(0, 1 << 24), sent_us=NOW, times=HOPS),
    lie(Token, position=POSITIONS, token=st.integers(0, 9), sent_us=NOW, times=HOPS, chances=CHANCES),
    lie(Pooled, sent_us=NOW, times=HOPS),
    lie(Step, position=POSITIONS, rows=ROWS, sample=st.booleans(), sent_us=NOW, times=HOPS),
    lie(Close),
)
PEERS = st.sampled_from(("n0", "n1", "n2", "n3", "n4", "stranger"))


@settings(max_examples=200)
@given(worlds(), st.data())
def test_lies_never_do_more_than_end_the_session(world: World, data: st.DataObject) -> None:
    for _ in range(30):
        deed = data.draw(st.sampled_from(("deliver", "deliver", "deliver", "lie", "gone", "stop")))
        if deed == "deliver" and world.bag:
            world.deliver(*world.bag.pop(0))
        elif deed == "lie":
            lie, liar = data.draw(LIES), data.draw(PEERS)
            to = "me" if isinstance(lie, Opened | Refused | Token | Pooled) else data.draw(PEERS)
            world.deliver(liar, to, lie, tuple(range(lie.rows)) if isinstance(lie, Step) else ())
        elif deed == "gone":
            world.tell(pipe.PeerGone(data.draw(PEERS), "lost"))
        elif deed == "stop" and data.draw(st.integers(0, 9)) == 0:
            world.tell(pipe.Stop("cancelled"))
    world.pass_time()


@settings(max_examples=200)
@given(messages(Open), st.sampled_from(("", "a", "b")))
def test_no_open_breaks_a_stage(opening: Open, us: str) -> None:
    try:
        stage = StageSession(opening, us)
    except RemoteProtocolError:
        return
    assert stage.hop.peer == us
    assert stage.is_last == (opening.sampling is not None or opening.pooled)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=12))
def test_a_stage_takes_what_has_no_gap(steps: list[tuple[int, int]]) -> None:
    route = (Hop(peer="a", incarnation=1, first=0, last=2),)
    opening = Open(
        session=S,
        attempt=1,
        origin="me",
        manifest="m",
        variant="v",
        route=route,
        index=0,
        capacity=10,
        sampling=Sampling(seed=0),
    )
    stage, filled = StageSession(opening, "a"), 0
    template = Step(session=S, attempt=1, position=0, rows=1, sample=False, sent_us=0)
    for position, rows in steps:
        step = replace(template, position=position, rows=rows)
        if position <= filled and position + rows <= 10:
            assert stage.take("me", step)
            filled = position + rows
        else:
            try:
                stage.take("me", step)
            except RemoteProtocolError:
                continue
            raise AssertionError(f"{step} was taken with {filled} rows")
