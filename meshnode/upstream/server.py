"""Asks an OpenAI-speaking server (Ollama speaks it, too) over HTTP, within limits; no redirects, no proxies."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Final

import httpx
import trio

from meshnode.core.errors import Declined, TransientError
from protocols.upstream.messages import End

FIRST_S: Final = 300.0  # until the server begins: it may have to load the model
NEXT_S: Final = 60.0  # between two pieces
MAX_LINE: Final = 1 << 20
MAX_TEXT: Final = 8 << 20  # of an answer
MAX_WORDS: Final = 200  # of an error of the server


class UpstreamServer:
    """Implements `Server` of services/upstream.py."""

    def __init__(self, url: str) -> None:
        """`url`: its root, like http://127.0.0.1:11434."""
        self.url = url

    async def answer(self, question: dict[str, Any]) -> AsyncGenerator[str | End, None]:
        """Pieces of text, at last an End. `question`: for /v1/chat/completions, or /v1/completions with a prompt.

        Raises Declined `no-model`, `bad-request`; TransientError. If cancelled or closed: the connection is closed,
        which ends the generation there.
        """
        path = "/v1/completions" if "prompt" in question else "/v1/chat/completions"
        body = {**question, "stream": True, "stream_options": {"include_usage": True}}
        async with httpx.AsyncClient(trust_env=False, timeout=None, follow_redirects=False) as client:
            try:
                request = client.build_request("POST", self.url + path, json=body)
                with trio.fail_after(FIRST_S):
                    response = await client.send(request, stream=True)
                try:
                    await self._check(response, question)
                    async with aclosing(self._read(response)) as events:
                        async for event in events:
                            yield event
                finally:
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                        await response.aclose()
            except trio.TooSlowError:
                raise TransientError(f"the server at {self.url} says nothing any more") from None
            except httpx.HTTPError as error:
                words = str(error)[:MAX_WORDS] or type(error).__name__
                raise TransientError(f"the server at {self.url} can't be asked: {words}") from error

    async def _check(self, response: httpx.Response, question: dict[str, Any]) -> None:
        if response.status_code == 200:
            return
        data = bytearray()
        with trio.move_on_after(NEXT_S):
            async for piece in response.aiter_bytes():
                data += piece
                if len(data) > MAX_LINE:
                    break
        words = _words(bytes(data)) or f"status {response.status_code}"
        if response.status_code == 404:
            raise Declined("no-model", f"the server at {self.url} has no model {question.get('model')!r}: {words}")
        if response.status_code in (400, 422):
            raise Declined("bad-request", f"the server at {self.url} can't answer this: {words}")
        raise TransientError(f"the server at {self.url} refuses: {words}")

    async def _read(self, response: httpx.Response) -> AsyncGenerator[str | End, None]:
        reason, prompt_tokens, tokens, size = "", 0, 0, 0
        async with aclosing(_lines(response.aiter_bytes())) as lines:
            while True:
                with trio.fail_after(NEXT_S):
                    line = await anext(lines, None)
                if line is None or line == b"data: [DONE]":
                    break
                if not line.startswith(b"data:"):
                    continue
                try:
                    event = json.loads(line[5:])
                    choice = (event.get("choices") or [{}])[0]
                    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                    reason = choice.get("finish_reason") or reason
                    usage = event.get("usage") or {}
                    prompt_tokens = int(usage.get("prompt_tokens") or prompt_tokens)
                    tokens = int(usage.get("completion_tokens") or tokens)
                    broken = event.get("error")
                except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
                    raise TransientError(f"the server at {self.url} sent what is no piece of an answer") from None
                if broken:
                    raise TransientError(f"the server at {self.url} broke off: {_words(line[5:])}")
                if not isinstance(text, str) or (size := size + len(text)) > MAX_TEXT:
                    raise TransientError(f"the server at {self.url} sent no text, or more than {MAX_TEXT} characters")
                if text:
                    yield text
        if not reason:
            raise TransientError(f"the server at {self.url} broke off in the middle of its answer")
        ended = "length" if reason == "length" else "stop"
        yield End(reason=ended, prompt_tokens=max(0, prompt_tokens), tokens=max(0, tokens))


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    buffer = bytearray()
    async for piece in pieces:
        buffer += piece
        *whole, rest = buffer.split(b"\n")
        for line in whole:
            yield bytes(line.rstrip(b"\r"))
        buffer = bytearray(rest)
        if len(buffer) > MAX_LINE:
            raise TransientError(f"a line of the server's answer has more than {MAX_LINE} bytes")
    if buffer:
        yield bytes(buffer)


def _words(data: bytes) -> str:
    """What an error says, in OpenAI's shape or Ollama's."""
    try:
        error = json.loads(data)["error"]
        words = error["message"] if isinstance(error, dict) else error
    except (ValueError, TypeError, LookupError, RecursionError):
        return ""
    return "".join(char for char in str(words)[:MAX_WORDS] if char.isprintable())
