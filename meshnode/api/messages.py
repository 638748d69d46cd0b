"""What is said to a running node and what it answers: one set of dataclasses for the node, the library and the
command line. Attributes are called as in the JSON that `meshnode status --json` and `generate --json` write.

Sizes are bytes, times are milliseconds unless the name says otherwise. Layers are [first, last).
Standard library only: programs that talk to a node must start fast.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from meshnode.core import errors
from meshnode.core.errors import BadRequest, Declined, NodeError
from protocols.errors import MeshError

Json = dict[str, Any]
Message = TypeVar("Message")

STATUS_VERSION: Final = 1  # of the JSON that `meshnode status --json` prints


# ---------------------------------------------------------------- an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Likely:
    """One of the most likely tokens. `bytes`: its text, of which it may be a part of a character."""

    token: int
    bytes: tuple[int, ...]
    logprob: float  # natural logarithm of its probability, by the model alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood(Likely):
    """How likely a token of the answer was. `top`: the most likely tokens in its place."""

    top: tuple[Likely, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool. `arguments`: a JSON object, as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer: a token, and the text that it completes, which may be empty. Token -1: only text."""

    text: str
    token: int
    likelihood: Likelihood | None = None  # if the question asks for `logprobs`
    call: ToolCall | None = None  # instead of text, where the answer calls a tool

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Piece:
        """From such JSON."""
        told = document.get("likelihood")
        call = document.get("call")
        return cls(
            document["text"],
            document["token"],
            None if told is None else read(Likelihood, told),
            None if call is None else read(ToolCall, call),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of a route: who computed which layers."""

    peer: str
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes(Stage):
    """Where the time of one decode step goes at one stage (medians)."""

    network_ms: float
    queue_ms: float
    compute_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model as the network serves it."""

    name: str = ""
    version: str = ""
    manifest: str = ""  # CID
    variant: str = ""
    layers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """A stage that was lost in the middle of an answer, which others went on with."""

    peer: str = ""  # empty: nobody knows which stage was silent
    first: int = 0
    last: int = 0  # one behind its last layer
    tokens: int = 0  # of the answer, when it was noticed
    at_ms: float = 0.0  # from the question until it was noticed
    gap_ms: float = 0.0  # from then to the next token
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """How an answer was computed."""

    model: ServedModel = ServedModel()  # what has answered
    route: tuple[Stage, ...] = ()
    adapter: str = ""  # CID of what was learned that answered; "": the bare model
    cached_tokens: int = 0  # of the prompt, computed for an earlier question and kept by all stages
    ttft_ms: float = 0.0  # from the question to the first token
    decode_tok_s: float | None = None  # tokens per second after the first; None below two tokens
    hops: tuple[StageTimes, ...] = ()
    return_ms: float = 0.0  # from the last stage back to this node
    replaced: tuple[Replaced, ...] = ()  # stages that were lost on the way
    upstream: str = ""  # peer whose own server has answered; the mesh computed nothing then


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer. `reason`: why it ended: "eos", "length", "stop" for a stop text, or
    "tool_calls" for an end after calls of tools.

    `id`: by which it can be judged (`feedback`); empty: the node does not keep it.
    """

    text: str
    reason: str
    stopped_by: str = ""  # the stop text
    id: str = ""
    token_ids: tuple[int, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()  # with the chat template
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[Likelihood, ...] = ()  # of each token, if the question asks for them
    receipt: Receipt = Receipt()

    def as_json(self) -> Json:
        """What `meshnode generate --json` writes: the receipt's fields beside the answer's."""
        document: Json = plain(self)
        receipt = document.pop("receipt")
        return {**document, **receipt}

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Answer:
        """From such JSON."""
        return read(cls, {**document, "receipt": document})


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """A text as one vector of length 1. Those of two texts are compared by their product."""

    vector: tuple[float, ...] = ()  # as many numbers as the model's hidden states have
    prompt_token_ids: tuple[int, ...] = ()
    receipt: Receipt = Receipt()

    def as_json(self) -> Json:
        """As it goes over the control socket."""
        document: Json = plain(self)
        return document

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Embedding:
        """From such JSON."""
        return read(cls, document)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the node knows of an answer that was judged. `label`: the right one; empty: nobody knows."""

    answer: str = ""
    correct: bool = False
    label: str = ""

    def as_json(self) -> Json:
        """What `meshnode feedback --json` prints."""
        document: Json = plain(self)
        return document

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Judgement:
        """From such JSON."""
        return read(cls, document)


# ---------------------------------------------------------------- the status of a node
# Every field has a default: a node of another version may not have it.


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatus:
    """One node of the network, as this node sees it. `state`: idle, intent, loading, serving or draining."""

    peer: str = ""
    name: str = ""
    connected: bool = False
    roles: tuple[str, ...] = ()
    round_trip_ms: float | None = None
    memory_bytes: int = 0  # that it gives for weights and sessions
    state: str = "idle"
    first: int | None = None  # layers that it serves
    last: int | None = None
    target: tuple[int, int] | None = None  # layers that it is going to serve
    sessions: int = 0
    layer_decode_us: int = 0
    layer_prefill_us: int = 0
    age_s: float | None = None  # of its last advert
    incarnation: int = 0
    trouble: str = ""  # why it does not serve what it should, in its own words
    duty: str = "full"  # or "paused" (no background work), "drained" (nor layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanStatus:
    """Layers of one variant of one manifest."""

    manifest: str = ""
    variant: str = ""
    first: int = 0
    last: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressStatus:
    """Layers on their way into this node. `phase`: fetching or opening."""

    span: SpanStatus = SpanStatus()
    phase: str = ""
    files: int = 0
    files_done: int = 0
    bytes_total: int = 0
    bytes_done: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """The engine process."""

    pid: int = 0
    rss_bytes: int = 0
    weight_bytes: int = 0
    kept_bytes: int = 0  # keys and values of prompts, for those that begin alike


@dataclass(frozen=True, slots=True, kw_only=True)
class DhtStatus:
    """The client of the public DHT."""

    peers: int = 0
    provided: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentStatus:
    """Model files: those on this device, and how far away those of the served model are."""

    used_bytes: int = 0
    quota_bytes: int = 0
    free_disk_bytes: int = 0
    room_bytes: int = 0
    fetched_bytes: int = 0
    served_bytes: int = 0
    bad_providers: dict[str, str] = field(default_factory=dict)
    encrypted: bool = False
    guests: dict[str, bool] = field(default_factory=dict)  # configured IPFS peers, and whether they are connected
    published: int = 0  # files given to the operator's IPFS daemon
    visitors: int = 0
    dht: DhtStatus | None = None
    hot_bytes: int = 0  # mapped by the engine
    warm_bytes: int = 0  # on this disk
    cold_bytes: int = 0  # elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiesStatus:
    """How many copies of the served model's files there are."""

    wanted: int = 0
    nodes: int = 0
    fewest: int = 0
    files: int = 0
    short: int = 0  # files with too few
    planned: int = 0  # of them, those that somebody is to copy
    groups: dict[str, int] = field(default_factory=dict)  # "layer.7" -> copies


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplesStatus:
    """What this device keeps to learn from. It stays there."""

    samples: int = 0
    labelled: int = 0  # can be trained on
    fresh: int = 0  # of them, those that nothing was trained on yet
    answers: int = 0  # that nobody has judged
    classes: int = 0
    size_bytes: int = 0
    encrypted: bool = False
    judged: int = 0  # of the last answers, those that were judged here
    judged_wrong: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseStatus:
    """An adapter that is proposed, rolled out, released or revoked, as this node sees it.

    `phase`: open, rolling, held, released, replaced, refused, overtaken, revoked, left or foreign; `why`: a clause.
    """

    version: str = ""
    adapter: str = ""  # CID of its manifest
    candidate: str = ""  # id that votes name
    phase: str = ""
    why: str = ""
    share_percent: float = 0.0  # of the nodes that may use it by now
    in_use: bool = False  # by questions of this node
    previous: str = ""  # adapter that it replaces; empty: the model alone
    base: str = ""  # CID of the model release that it is for
    frame: str = ""
    suite: str = ""  # CID of the samples that it is judged on
    round: int = 0
    parents: tuple[str, ...] = ()
    proposers: tuple[str, ...] = ()
    votes: int = 0
    in_favour: int = 0
    voters: int = 0  # members with a vote that are there, or are heard
    median: float | None = None  # of the votes: change in loss, nats per token
    right: int = 0  # answers of this node with it
    wrong: int = 0

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> ReleaseStatus:
        """From the JSON that `meshnode release show --json` prints."""
        return read(cls, document)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack:
    """What a person's going back does."""

    release: ReleaseStatus = ReleaseStatus()
    effect: str = ""  # a sentence

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> RolledBack:
        """From the JSON that `meshnode release rollback --json` prints."""
        return read(cls, document)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningStatus:
    """What this device learns with others. `losses`: of the last steps, oldest first."""

    state: str = "off"  # off, waiting, preparing, gathering, training, publishing, exchanging, mixing, done
    why: str = ""  # what it waits for, or what went wrong
    lesson: str = ""  # CID
    frame: str = ""  # CID; what was learned lies in a folder of this name
    model: str = ""  # CID of the manifest
    mode: str = ""
    round: int = 0
    rounds: int = 0
    steps: int = 0
    samples: int = 0
    participants: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()
    train_s: float = 0.0
    sent_bytes: int = 0
    fetched_bytes: int = 0
    published: int = 0  # deltas
    mixed: int = 0  # deltas of others
    skipped: dict[str, int] = field(default_factory=dict)  # partners passed over, by reason
    refused: dict[str, int] = field(default_factory=dict)  # deltas not used, by reason
    refusals: tuple[str, ...] = ()  # the last ones, in words
    paused: bool = False
    adapter: str = ""  # CID of what this node made of the lesson


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthStatus:
    """One thing that is wrong, with what to do. `severity`: high, medium or low."""

    code: str = ""
    severity: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalStatus:
    """A peer that was not let in (`by_us`), or that did not let us in."""

    at_ms: int = 0
    peer: str = ""
    code: str = ""
    text: str = ""
    by_us: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DutyStatus:
    """How much the node does for the mesh, and why not all of it.

    `duty`: full, paused (no learning, no copies, nothing published) or drained (nor layers).
    """

    duty: str = "full"
    why: str = ""
    ordered: str = ""  # what `meshnode pause` or `drain` has asked for; empty: nothing
    since_ms: int = 0  # UTC, of the order
    until_ms: int = 0  # 0: until `meshnode resume`


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Everything that `meshnode status` shows."""

    version: int = STATUS_VERSION
    software: str = ""
    peer: str = ""
    pid: int = 0
    network: str = ""
    addresses: tuple[str, ...] = ()
    api_url: str = ""  # where it answers HTTP; empty: nowhere
    uptime_s: float = 0.0
    ready: bool = False
    readiness: str = ""  # why not, or how long a probe token took
    model: ServedModel | None = None
    prediction: str = ""
    predicted_tok_s: float = 0.0  # of one answer; 0: nobody knows
    me: PeerStatus = PeerStatus()
    peers: tuple[PeerStatus, ...] = ()
    duty: DutyStatus = DutyStatus()
    progress: ProgressStatus | None = None
    sessions: int = 0  # answers that this node is asking for
    rss_bytes: int = 0
    torch_imported: bool = False
    engine: EngineStatus | None = None
    content: ContentStatus = field(default_factory=ContentStatus)
    copies: CopiesStatus | None = None
    samples: SamplesStatus = SamplesStatus()
    releases: tuple[ReleaseStatus, ...] = ()  # of adapters, the newest first
    learning: LearningStatus = field(default_factory=LearningStatus)
    upstream: dict[str, tuple[str, ...]] = field(default_factory=dict)  # model -> peers whose own servers run it
    health: tuple[HealthStatus, ...] = ()
    refusals: tuple[RefusalStatus, ...] = ()
    unreachable: dict[str, str] = field(default_factory=dict)  # peer or address -> why

    def as_json(self) -> Json:
        """What `meshnode status --json` prints."""
        document: Json = plain(self)
        return document

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Status:
        """From such JSON; what another version has more is left out, what it lacks has its default."""
        return read(cls, document)


# ---------------------------------------------------------------- writing and reading


def plain(value: Any) -> Any:
    """As JSON has it: objects, lists and scalars."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def read(kind: type[Message], document: Mapping[str, Any]) -> Message:
    """A dataclass out of plain JSON data, with the dataclasses in its fields."""
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hint, document[name]) for name, hint in hints.items() if name in document})


def _value(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return read(hint, value)
    inside = typing.get_args(hint)
    match typing.get_origin(hint):
        case types.UnionType:
            return _value(next(part for part in inside if part is not types.NoneType), value)
        case kind if kind is tuple:
            return tuple(_value(inside[0], item) for item in value)
        case kind if kind is dict:
            return {key: _value(inside[1], item) for key, item in value.items()}
        case _:
            return value


# ---------------------------------------------------------------- errors

# Those that cross the control socket as they are; any other is a Declined with its code, or a NodeError.
_NAMED: Final = {
    kind.__name__: kind
    for kind in (
        errors.PeerUnreachable,
        errors.ContentUnavailable,
        errors.EngineLost,
        errors.ConfigError,
        errors.IdentityError,
        errors.ModelError,
        errors.DiskError,
    )
}
INTERNAL: Final = "internal"


def error_json(error: MeshError, text: str) -> Json:
    """An error as the last line of an answer, in the sentence `text`."""
    if isinstance(error, (Declined, NodeError)):
        code = error.code
    else:
        code = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _NAMED), INTERNAL)
    return {"error": {"code": code, "text": text}}


def read_error(error: Mapping[str, Any]) -> MeshError:
    """The same error on this side of the socket."""
    code, text = str(error.get("code")), str(error.get("text"))
    if code in _NAMED:
        return _NAMED[code](text)
    if code == "bad-request":
        return BadRequest(text)
    return NodeError(code, text) if code == INTERNAL else Declined(code, text)
