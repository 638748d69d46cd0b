"""Finds the calls of tools in an answer, however its text comes in pieces."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from meshnode.text.tools import HERMES, LLAMA, MISTRAL

_BEGINS: Final = {HERMES: "<tool_call>", MISTRAL: "[TOOL_CALLS]", LLAMA: "<|python_tag|>"}
_ENDS: Final = {HERMES: "</tool_call>"}  # the others end with the answer
_NAMED: Final = re.compile(r"\s*([A-Za-z0-9_.:-]{1,64})\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?(?=\{)")
_DECODER: Final = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool. `arguments`: a JSON object, as text."""

    name: str
    arguments: str


class ToolCalls:
    """Holds back text that may be a call. What is none after all is shown as it came."""

    def __init__(self, style: str, names: Collection[str], *, forced: bool) -> None:
        """
        Args:
          style: of the chat template (`tools.style_of`).
          names: of the tools that may be called.
          forced: the answer has the form of a call (`tools.form_of`).
        """
        self._style = style
        self._names = names
        self._begin, self._end = _BEGINS[style], _ENDS.get(style)
        self._opened = ""  # with what the call began that is being read
        self._inside = forced and style != HERMES
        self._held = ""
        self._fresh = True  # whether nothing was shown yet, since the answer or a call
        self.found = 0

    def feed(self, text: str) -> tuple[str, list[ToolCall]]:
        """Text that may be shown, and calls that are complete."""
        self._held += text
        shown, calls = "", list[ToolCall]()
        while True:
            if self._inside:
                end = -1 if self._end is None else self._held.find(self._end)
                if end < 0 or self._end is None:
                    return shown, calls
                body, rest = self._held[:end], self._held[end + len(self._end) :]
                more, text = self._read(body, self._end)
                calls += more
                shown += text
                self._inside, self._held = False, rest
                continue
            at = self._held.find(self._begin)
            if at >= 0:
                before, self._held = self._held[:at], self._held[at + len(self._begin) :]
                shown += self._show(before.rstrip())
                self._inside, self._opened = True, self._begin
                continue
            if self._style == LLAMA and self._fresh and self._held.lstrip().startswith("{"):
                self._inside, self._opened = True, ""
                continue
            keep = self._may_begin()
            before, self._held = self._held[:keep], self._held[keep:]
            return shown + self._show(before), calls

    def rest(self) -> tuple[str, list[ToolCall]]:
        """What is left when the answer ends."""
        held, self._held = self._held, ""
        if not self._inside:
            return self._show(held), []
        self._inside = False
        calls, text = self._read(held, "")
        return text, calls

    def _show(self, text: str) -> str:
        """Blanks before the answer, and after a call, are left out."""
        text = text.lstrip() if self._fresh and self.found else text
        self._fresh = self._fresh and not text.strip()
        return text

    def _may_begin(self) -> int:
        """Where the end of the held text begins that may be the beginning of a call, with the blanks before it."""
        size = len(self._held)
        for length in range(min(len(self._begin) - 1, size), 0, -1):
            if self._begin.startswith(self._held[size - length :]):
                size -= length
                break
        return len(self._held[:size].rstrip())

    def _read(self, body: str, end: str) -> tuple[list[ToolCall], str]:
        """The calls in a text, or the text to be shown instead."""
        calls = self._calls(body)
        if not calls:
            return [], self._show(self._opened + body + end)
        self.found += len(calls)
        self._fresh = True
        return calls, ""

    def _calls(self, body: str) -> list[ToolCall]:
        """All of them; none when anything else stands there."""
        found: list[ToolCall] = []
        at = 0
        while at < len(body):
            name = None
            if self._style == MISTRAL and (match := _NAMED.match(body, at)):
                name, at = match[1], match.end()
            while at < len(body) and body[at] in " \t\r\n;":
                at += 1
            if at == len(body):
                break
            try:
                value, at = _DECODER.raw_decode(body, at)
            except (ValueError, RecursionError):
                return []
            for one in value if isinstance(value, list) else [value]:
                call = self._call(one if name is None else {"name": name, "arguments": one})
                if call is None:
                    return []
                found.append(call)
        return found

    def _call(self, value: Any) -> ToolCall | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):  # some models write the object into a text
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))
