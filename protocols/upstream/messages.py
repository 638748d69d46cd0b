"""Messages of /meshnode/upstream/1, and what a member offers (a notice of the kind `upstream`). See SPEC.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.codec import Union, at, decode, message
from protocols.errors import RemoteProtocolError

PROTOCOL: Final = "/meshnode/upstream/1"
MAX_MESSAGE_BYTES: Final = 4096
MAX_BODY_BYTES: Final = 1 << 20  # of a question, or of one piece of an answer
MAX_MODELS: Final = 32
MAX_NAME: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Offers:
    """Names of models, as the server has them."""

    models: tuple[str, ...] = at(1, limit=MAX_MODELS)


@message(tag=1)
@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Asker -> offerer. The body of the frame is the question: JSON, as OpenAI's /v1/chat/completions has it."""

    model: str = at(1, limit=MAX_NAME)


@message(tag=2)
@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Offerer -> asker: more of the answer, which is the body of the frame (UTF-8)."""


@message(tag=3)
@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The answer is whole. Counts are the server's own, 0 where it tells none."""

    reason: str = at(1, limit=32)  # "stop", "length"
    prompt_tokens: int = at(2, high=1 << 32, default=0)
    tokens: int = at(3, high=1 << 32, default=0)


@message(tag=4)
@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """No answer, or no whole one, and why."""

    code: str = at(1, limit=32)  # "busy", "no-model", "forbidden", "bad-request", "upstream-failed"
    reason: str = at(2, limit=500)


Reply = Piece | End | Refused
MESSAGES: Final[Union[Ask | Piece | End | Refused]] = Union(
    PROTOCOL, Ask, Piece, End, Refused, limit=MAX_MESSAGE_BYTES
)


def read_offers(content: bytes) -> Offers:
    """What a notice holds. Raises RemoteProtocolError."""
    offers = decode(Offers, content)
    for name in offers.models:
        if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
            raise RemoteProtocolError(f"{name[:40]!r} is no name of a model: 1 to {MAX_NAME} printable characters")
    if len(set(offers.models)) != len(offers.models):
        raise RemoteProtocolError("a model is offered twice")
    return offers
