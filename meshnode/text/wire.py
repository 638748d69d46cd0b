"""What passes between the node and the tokenizer's process, on socket pairs of one machine.

One `control` socket per process: first a Load and the bytes of the files it announces; the process answers with one
frame. After that the node sends orders of five bytes, each with a number: FORK is answered by the same five bytes and
the socket of a new fork, STOP ends that fork. On the socket of a fork go frames in turn, a question and its answer,
and at last an obituary.

A frame (protocols/frame.py) has a JSON object as its header; texts, token ids and words are its body. The node
believes nothing: whatever it reads is checked here.
"""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from meshnode.core.confinement.confine import ALL
from meshnode.core.errors import Declined, ModelError
from meshnode.text.limits import Limits
from meshnode.text.tools import STYLES
from meshnode.text.vocabulary import MAX_BYTES, MAX_WORDS
from protocols.errors import RemoteProtocolError
from protocols.frame import Frame, pack

ORDER: Final = struct.Struct("<cI")  # what, and the number of the fork
FORK: Final = b"F"
STOP: Final = b"S"
MAX_HEADER: Final = 1 << 16
MAX_LOADED: Final = 4 + 2 * MAX_WORDS + MAX_BYTES
MAX_QUESTION: Final = 8 << 20  # a million characters in JSON
MAX_TOKENS: Final = 1 << 20
MAX_ANSWER: Final = 4 * MAX_TOKENS  # bytes
MAX_MASK: Final = 1 << 18  # a bit for each of a million words, and twice that
MAX_SENTENCE: Final = 2000  # characters of a reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Sizes of the files that follow, in this order; None for a file that the model doesn't have."""

    tokenizer: int
    specials: int | None
    template: int | None
    vocab: int  # tokens that the model can give
    eos: tuple[int, ...]  # tokens that end an answer, where grammars are wanted, too
    limits: Limits


@dataclass(frozen=True, slots=True)
class Tokens:
    """The answer to a question."""

    ids: tuple[int, ...]
    more: bool  # whether the fork takes another question
    confined: tuple[str, ...] = ()  # parts of its confinement that hold, as it says itself


@dataclass(frozen=True, slots=True)
class Rendered:
    """The answer to a question for the text of a conversation."""

    text: str
    more: bool


@dataclass(frozen=True, slots=True)
class Mask:
    """The answer to a grammar, and to each token of its text: what may follow (`grammar.Walk.mask`)."""

    bits: bytes


@dataclass(frozen=True, slots=True)
class Asked:
    """A question: `text`, or `turns` of a conversation; `shown`: for their text, not for their tokens.

    Or a `grammar`, of whose text `taken` is the next token.
    """

    text: str = ""
    turns: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()  # that the answer may call
    shown: bool = False
    grammar: str = ""  # its kind
    taken: int | None = None


@dataclass(frozen=True, slots=True)
class Died:
    """How a fork ended, instead of its answer."""

    signal: int  # 0: by itself


def pack_load(load: Load) -> bytes:
    return pack(json.dumps(asdict(load)).encode())


def read_load(frame: Frame) -> Load:
    fields = json.loads(frame.header)
    return Load(**{**fields, "eos": tuple(fields["eos"]), "limits": Limits(**fields["limits"])})


def pack_loaded(decoder: Mapping[str, Any] | None, style: str, words: bytes) -> bytes:
    """`style`: in which tools are called (`tools.style_of`)."""
    return pack(json.dumps({"decoder": decoder, "style": style}).encode(), words)


def pack_text(text: str) -> bytes:
    return pack(b'{"ask":"text"}', text.encode())


def pack_turns(
    turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *, shown: bool = False
) -> bytes:
    """`shown`: for their text, not for their tokens."""
    header = b'{"ask":"shown"}' if shown else b'{"ask":"turns"}'
    return pack(header, json.dumps({"turns": list(turns), "tools": list(tools)}, ensure_ascii=False).encode())


def pack_grammar(kind: str, text: bytes) -> bytes:
    return pack(json.dumps({"ask": "grammar", "kind": kind}).encode(), text)


def pack_taken(token: int) -> bytes:
    return pack(json.dumps({"ask": "taken", "token": token}).encode())


def pack_mask(bits: bytes) -> bytes:
    return pack(b'{"mask":true}', bits)


def read_question(frame: Frame) -> Asked:
    header = json.loads(frame.header)
    what = header["ask"]
    if what == "grammar":
        return Asked(grammar=header["kind"], text=frame.body.decode(errors="replace"))
    if what == "taken":
        return Asked(taken=header["token"])
    if what == "text":
        return Asked(text=frame.body.decode())
    body = json.loads(frame.body)
    return Asked(turns=tuple(body["turns"]), tools=tuple(body["tools"]), shown=what == "shown")


def pack_tokens(tokens: Sequence[int], *, more: bool, confined: Sequence[str] = ()) -> bytes:
    """`more`: the fork takes another question; `confined`: what it has given up."""
    body = array("i", tokens)
    if sys.byteorder == "big":
        body.byteswap()
    return pack(json.dumps({"more": more, "confined": list(confined)}).encode(), body.tobytes())


def pack_rendered(text: str, *, more: bool) -> bytes:
    """Raises Declined: too long to be shown."""
    body = text.encode()
    if len(body) > MAX_ANSWER:
        raise Declined("too-long", f"the text of the conversation has {len(body)} bytes; {MAX_ANSWER} can be shown")
    return pack(b'{"shown":true,"more":true}' if more else b'{"shown":true}', body)


def pack_error(error: Declined | ModelError) -> bytes:
    code = error.code if isinstance(error, Declined) else ""
    return pack(json.dumps({"error": code, "reason": str(error)[:MAX_SENTENCE]}).encode())


def pack_died(signal: int) -> bytes:
    return pack(json.dumps({"died": signal}).encode())


def read_loaded(frame: Frame) -> tuple[Mapping[str, Any] | None, str]:
    """The decoder's settings, the style of calls; the body are the words. Raises ModelError, RemoteProtocolError."""
    header = _header(frame)
    decoder = header.get("decoder", ...)
    if decoder is not None and not isinstance(decoder, dict):
        raise RemoteProtocolError("it sent no decoder")
    style = header.get("style")
    if style not in STYLES:
        raise RemoteProtocolError("it sent no style of calls")
    return decoder, str(style)


def read_answer(frame: Frame) -> Tokens | Rendered | Mask | Died:
    """Raises Declined, ModelError, RemoteProtocolError."""
    header = _header(frame)
    if "died" in header:
        signal = header["died"]
        if type(signal) is not int or not 0 <= signal < 256:
            raise RemoteProtocolError("it sent no signal")
        return Died(signal)
    if header.get("mask") is True:
        return Mask(bytes(frame.body))
    if header.get("shown") is True:
        try:
            return Rendered(frame.body.decode(), header.get("more") is True)
        except UnicodeDecodeError as error:
            raise RemoteProtocolError(f"it sent a text that is none: {error}") from error
    if len(frame.body) % 4:
        raise RemoteProtocolError(f"{len(frame.body)} bytes are no token ids")
    tokens = array("i", frame.body)
    if sys.byteorder == "big":
        tokens.byteswap()
    if tokens and min(tokens) < 0:
        raise RemoteProtocolError("it sent a negative token id")
    confined = header.get("confined")
    parts = tuple(part for part in ALL if part in confined) if isinstance(confined, list) else ()
    return Tokens(tuple(tokens), header.get("more") is True, parts)


def _header(frame: Frame) -> dict[str, Any]:
    """Raises what the frame says is wrong, or RemoteProtocolError."""
    try:
        header = json.loads(frame.header)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"what it sent can't be read: {error}") from error
    if not isinstance(header, dict):
        raise RemoteProtocolError("what it sent is no object")
    if "error" in header:
        reason = str(header.get("reason"))[:MAX_SENTENCE]
        match header["error"]:
            case "":
                raise ModelError(reason)
            case "too-long":
                raise Declined("too-long", reason)
            case "bad-request" | "bad-grammar" as code:
                raise Declined(code, reason)
            case _:
                raise RemoteProtocolError("it sent an unknown kind of error")
    return header
