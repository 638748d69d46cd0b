"""Messages and tools of the Anthropic API, as questions have them."""

from __future__ import annotations

import json
from typing import Any, Final

from meshnode.http.body import Json, field, shown
from meshnode.http.problems import unsupported, wrong

SKIPPED: Final = ("thinking", "redacted_thinking")  # blocks of earlier answers that no template takes
CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}


def tools_of(body: Json) -> Json:
    """Tools and which is to be called. Tools that run at Anthropic's are passed over. Raises Problem 400."""
    tools = []
    for index, tool in enumerate(field(body, "tools", list, [])):
        if not isinstance(tool, dict):
            raise wrong("tools", f"tools.{index} is {shown(tool)}; it takes an object")
        if tool.get("type", "custom") != "custom":
            continue
        function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
        if tool.get("description") is not None:
            function["description"] = tool["description"]
        tools.append({"type": "function", "function": function})
    if not tools:
        return {}
    choice = field(body, "tool_choice", dict, {})
    kind = choice.get("type", "auto")
    if kind == "tool":
        return {"tools": tools, "tool_choice": {"function": {"name": choice.get("name")}}}
    if kind not in CHOICES:
        raise wrong("tool_choice", f"tool_choice.type is {shown(kind)}; it takes auto, any, tool or none")
    return {"tools": tools, "tool_choice": CHOICES[kind]}


def turns_of(body: Json) -> list[Json]:
    """The system text and the messages as turns. Raises Problem 400."""
    system = text_of(body.get("system"), "system") if body.get("system") is not None else ""
    turns: list[Json] = [{"role": "system", "content": system}] if system else []
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "messages: takes a list of messages, and not an empty one")
    for index, message in enumerate(messages):
        at = f"messages.{index}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant", "system"):
            raise wrong(f"{at}.role", f"{at}.role is {shown(role)}; it takes user or assistant")
        turns += _turns(role, message.get("content"), f"{at}.content")
    if turns[-1]["role"] == "assistant":
        raise unsupported("messages", "messages: this model can't go on with an answer that was begun; end with user")
    return turns


def _turns(role: str, content: Any, at: str) -> list[Json]:
    """One message: results of tools are turns of their own, before what the user says."""
    blocks = content if isinstance(content, list) else []
    kinds = [block.get("type") if isinstance(block, dict) else None for block in blocks]
    results = [block for block, kind in zip(blocks, kinds, strict=True) if kind == "tool_result"]
    calls = [block for block, kind in zip(blocks, kinds, strict=True) if kind == "tool_use"]
    rest = [block for block in blocks if block not in results and block not in calls]
    turns: list[Json] = [
        {
            "role": "tool",
            "content": text_of(result.get("content") or "", f"{at}.tool_result"),
            "tool_call_id": result.get("tool_use_id"),
        }
        for result in results
    ]
    text = text_of(rest if isinstance(content, list) else content, at)
    if calls:
        turns.append({"role": role, "content": text, "tool_calls": [_call(call) for call in calls]})
    elif text or not results:
        turns.append({"role": role, "content": text})
    return turns


def _call(block: Json) -> Json:
    function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
    return {"id": block.get("id"), "type": "function", "function": function}


def text_of(content: Any, at: str) -> str:
    """The text of a message: a string, or blocks of text. Raises Problem 400."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(at, f"{at} is {shown(content)}; it takes a text or a list of blocks")
    texts = []
    for index, block in enumerate(content):
        told = block if isinstance(block, dict) else {}
        kind, text = told.get("type"), told.get("text")
        if kind in SKIPPED:
            continue
        if kind != "text":
            raise unsupported(at, f"{at}.{index} is of type {shown(kind)}; this model reads text alone")
        if not isinstance(text, str):
            raise wrong(at, f"{at}.{index}.text is {shown(text)}; it takes a text")
        texts.append(text)
    return "\n".join(texts)
