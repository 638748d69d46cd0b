"""Tools that an answer may call: how they are asked for, how models are told, and the form of a call.

Three styles of chat templates are known by what stands in them: Hermes (also Qwen: JSON between <tool_call> tags),
Mistral ([TOOL_CALLS] and a list) and Llama 3 (a JSON object, maybe after <|python_tag|>). A model whose template
knows no tools is told about them in its system turn, in the style of Hermes. Standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from meshnode.core.errors import BadRequest
from meshnode.text.forms import BETWEEN, JSON_SCHEMA, LARK

HERMES, MISTRAL, LLAMA = "hermes", "mistral", "llama"
STYLES: Final = (HERMES, MISTRAL, LLAMA)
# Special tokens that are shown in an answer all the same: they say where a call begins.
MARKERS: Final = frozenset({"<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"})
MAX_TOOLS: Final = 128
MAX_TOOL_BYTES: Final = 1 << 18  # of all tools, as JSON
AUTO, NONE, REQUIRED = "auto", "none", "required"
_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_ARGUMENTS: Final = {HERMES: "arguments", MISTRAL: "arguments", LLAMA: "parameters"}

Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}


def style_of(template: str) -> str:
    """In which style a chat template wants tools to be called."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" not in template and "ipython" in template and "tools" in template:
        return LLAMA
    return HERMES


def read_tools(value: Any) -> tuple[Tool, ...]:
    """Tools as the OpenAI API has them. Raises BadRequest with a sentence about the first thing that is wrong."""
    if not isinstance(value, (list, tuple)) or len(value) > MAX_TOOLS:
        raise BadRequest(f"tools is a list of at most {MAX_TOOLS} tools")
    tools = []
    for tool in value:
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping):
            raise BadRequest('a tool has the type "function", and a function with a name')
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise BadRequest(
                f"{repr(name)[:40]} is no name of a tool; it takes 1 to 64 letters, digits and signs of _ - . :"
            )
        if not isinstance(function.get("description") or "", str):
            raise BadRequest(f"the description of the tool {name} is no text")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise BadRequest(f"the parameters of the tool {name} are no JSON schema")
        kept = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
        tools.append({"type": "function", "function": {"parameters": {"type": "object", "properties": {}}, **kept}})
    if len(set(names_of(tools))) != len(tools):
        raise BadRequest("two tools have the same name")
    try:
        size = len(json.dumps(tools, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"the tools can't be written as JSON: {error}") from error
    if size > MAX_TOOL_BYTES:
        raise BadRequest(f"the tools have {size} bytes as JSON; {MAX_TOOL_BYTES} are possible")
    return tuple(tools)


def read_choice(value: Any, tools: Sequence[Tool]) -> str:
    """Which tool is to be called: "auto", "none", "required", or the name of one. Raises BadRequest."""
    if isinstance(value, Mapping):  # as the OpenAI API names one
        function = value.get("function")
        value = function.get("name") if isinstance(function, Mapping) else None
    if value in (AUTO, NONE) or (tools and value == REQUIRED):
        return str(value)
    if not isinstance(value, str) or value not in names_of(tools):
        raise BadRequest(f"tool_choice is {repr(value)[:40]}; it takes auto, none, required, or the name of a tool")
    return value


def names_of(tools: Sequence[Tool]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]


def form_of(style: str, tools: Sequence[Tool], choice: str) -> tuple[str, str] | None:
    """The form of an answer that has to call a tool, as `Question.form`; None where it need not.

    Raises BadRequest: two tools give the same name to different definitions.
    """
    if choice in (AUTO, NONE):
        return None
    calls, definitions = [], dict[str, dict[str, Any]]()
    for tool in tools:
        function = tool["function"]
        if choice not in (REQUIRED, function["name"]):
            continue
        parameters = dict(function["parameters"])
        for place in ("$defs", "definitions"):  # what refers to them does so from the root
            for name, schema in (parameters.pop(place, None) or {}).items():
                if definitions.setdefault(place, {}).setdefault(name, schema) != schema:
                    raise BadRequest(f"two tools have different definitions of {name[:40]}; give them two names")
        name = {"const": function["name"]}
        calls.append(
            {
                "type": "object",
                "properties": {"name": name, _ARGUMENTS[style]: parameters},
                "required": ["name", _ARGUMENTS[style]],
                "additionalProperties": False,
            }
        )
    call = {"anyOf": calls}
    schema = {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if style == MISTRAL else call
    text = json.dumps({**schema, **definitions, "x-guidance": {"whitespace_pattern": BETWEEN}}, ensure_ascii=False)
    if style != HERMES:
        return JSON_SCHEMA, text
    return LARK, f'start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {text}'


def told(turns: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """A conversation for a template that knows no tools: what it leaves out is said in words."""
    out: list[dict[str, Any]] = []
    for turn in turns:
        calls = [f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" for call in turn.get("tool_calls", ())]
        content = "\n".join(part for part in (turn["content"], *calls) if part)
        if turn["role"] == "tool":
            out.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        else:
            out.append({"role": turn["role"], "content": content})
    if not tools:
        return out
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = (
        "You may call functions to help with what the user asks. These are there, as JSON schemas:\n"
        f"<tools>\n{listed}\n</tools>\n"
        "To call one, answer with its name and arguments as a JSON object between tags:\n"
        '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
    )
    if out and out[0]["role"] == "system":
        out[0]["content"] = f"{out[0]['content']}\n\n{text}"
    else:
        out.insert(0, {"role": "system", "content": text})
    return out
