"""Tools: what is asked for, how models are told, and calls found in answers that come in any pieces."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from meshnode.core.errors import BadRequest
from meshnode.text.grammar import Grammars
from meshnode.text.limits import Limits
from meshnode.text.tokenizer import ModelText
from meshnode.text.tool_calls import ToolCall, ToolCalls
from meshnode.text.tools import (
    HERMES,
    LLAMA,
    MAX_TOOLS,
    MISTRAL,
    STYLES,
    form_of,
    read_choice,
    read_tools,
    style_of,
    told,
)
from tests.text_files import VOCAB, byte_tokenizer

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "maxLength": 9}, "days": {"enum": [1, 2, 3]}},
            "required": ["town", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
TOOLS = read_tools([WEATHER, CLOCK])
NAMES = ("weather", "clock")
ROME = ToolCall("weather", '{"town": "Rome", "days": 1}')
NOW = ToolCall("clock", "{}")
CALL = '{"name": "weather", "arguments": {"town": "Rome", "days": 1}}'

ANSWERS: dict[str, tuple[str, str, str, list[ToolCall]]] = {
    "hermes": (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [ROME]),
    "hermes, text before": (HERMES, f"I look.\n<tool_call>{CALL}</tool_call>\n", "I look.", [ROME]),
    "hermes, two": (
        HERMES,
        f'<tool_call>{CALL}</tool_call>\n<tool_call>{{"name": "clock"}}</tool_call>',
        "",
        [ROME, NOW],
    ),
    "hermes, text after": (HERMES, f"<tool_call>{CALL}</tool_call>\nDone.", "Done.", [ROME]),
    "hermes, cut off": (HERMES, f"<tool_call>{CALL}", "", [ROME]),
    "hermes, no JSON": (HERMES, "<tool_call>rain</tool_call>!", "<tool_call>rain</tool_call>!", []),
    "hermes, unknown name": (
        HERMES,
        '<tool_call>{"name": "bomb"}</tool_call>',
        '<tool_call>{"name": "bomb"}</tool_call>',
        [],
    ),
    "hermes, arguments in a text": (
        HERMES,
        '<tool_call>{"name": "clock", "arguments": "{}"}</tool_call>',
        "",
        [NOW],
    ),
    "hermes, arguments that are none": (
        HERMES,
        '<tool_call>{"name": "clock", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": [1]}</tool_call>',
        [],
    ),
    "hermes, plain": (HERMES, "a < b and <tool> is no call  ", "a < b and <tool> is no call  ", []),
    "mistral": (MISTRAL, f"[TOOL_CALLS] [{CALL}]", "", [ROME]),
    "mistral, two": (MISTRAL, f'[TOOL_CALLS][{CALL}, {{"name": "clock", "arguments": {{}}}}]', "", [ROME, NOW]),
    "mistral, named": (
        MISTRAL,
        '[TOOL_CALLS]weather[ARGS]{"town": "Rome", "days": 1}[TOOL_CALLS]'.removesuffix("[TOOL_CALLS]"),
        "",
        [ROME],
    ),
    "mistral, plain": (MISTRAL, "[TOOL_BOX] is empty", "[TOOL_BOX] is empty", []),
    "llama": (LLAMA, '{"name": "weather", "parameters": {"town": "Rome", "days": 1}}', "", [ROME]),
    "llama, tagged, two": (
        LLAMA,
        '<|python_tag|>{"name": "clock", "parameters": {}}; {"name": "clock", "parameters": {}}',
        "",
        [NOW, NOW],
    ),
    "llama, a JSON text": (LLAMA, '{"town": "Rome"}', '{"town": "Rome"}', []),
    "llama, plain": (LLAMA, "Rome {it rains}", "Rome {it rains}", []),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_calls_are_found_however_the_text_comes(name: str) -> None:
    style, text, shown, calls = ANSWERS[name]
    rng = random.Random(1)
    for cut in [len(text), 1, *(rng.randint(2, 9) for _ in range(20))]:
        reader = ToolCalls(style, NAMES, forced=False)
        texts, found = [], []
        for begin in range(0, len(text), cut):
            piece, more = reader.feed(text[begin : begin + cut])
            texts.append(piece)
            found += more
        piece, more = reader.rest()
        assert ("".join(texts) + piece, found + more) == (shown, calls), cut
        assert reader.found == len(calls)


def test_text_that_is_no_call_does_not_wait() -> None:
    reader = ToolCalls(HERMES, NAMES, forced=False)
    assert reader.feed("It is <b>warm")[0] == "It is <b>warm"
    assert reader.feed(" <tool") == ("", [])
    assert reader.feed("box>")[0] == " <toolbox>"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("choice", ["required", "weather"])
def test_an_answer_that_has_to_call_does(style: str, choice: str) -> None:
    """Whatever is drawn by the form is a call, and is read as one."""
    form = form_of(style, TOOLS, choice)
    assert form is not None
    letters = byte_tokenizer()
    grammars = Grammars(letters.to_str().encode(), VOCAB, (1,))
    for seed in range(8):
        rng, walk, out = random.Random(seed), grammars.begin(*form), list[int]()
        while True:
            mask = walk.mask()
            token = rng.choice([t for t in range(VOCAB) if mask[t >> 3] >> (t & 7) & 1])
            if token == 1:
                break
            out.append(token)
            walk.take(token)
        reader = ToolCalls(style, NAMES, forced=True)
        text, found = reader.feed(letters.decode(out))
        more, rest = reader.rest()
        assert text + more == "" and len(found + rest) == 1, (seed, letters.decode(out))
        call = (found + rest)[0]
        assert choice in ("required", call.name)
        if call.name == "weather":
            assert json.loads(call.arguments).keys() == {"town", "days"}


def test_no_form_unless_it_has_to_call() -> None:
    assert form_of(HERMES, TOOLS, "auto") is form_of(HERMES, TOOLS, "none") is None


def test_definitions_are_found_from_the_root() -> None:
    def tool(name: str, kind: str) -> dict[str, Any]:
        parameters = {"$ref": "#/$defs/one", "$defs": {"one": {"type": kind}}}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    form = form_of(LLAMA, read_tools([tool("a", "object")]), "a")
    assert form is not None and json.loads(form[1])["$defs"] == {"one": {"type": "object"}}
    with pytest.raises(BadRequest, match="two tools have different definitions of one"):
        form_of(LLAMA, read_tools([tool("a", "object"), tool("b", "string")]), "required")


WRONG: dict[str, tuple[Any, str]] = {
    "no list": ({}, "tools is a list of at most"),
    "too many": ([CLOCK] * (MAX_TOOLS + 1), "tools is a list of at most"),
    "another type": ([{"type": "retrieval"}], 'a tool has the type "function"'),
    "no name": ([{"type": "function", "function": {}}], "None is no name of a tool"),
    "a name with a blank": ([{"type": "function", "function": {"name": "a b"}}], "'a b' is no name"),
    "parameters in a text": (
        [{"type": "function", "function": {"name": "a", "parameters": "x"}}],
        "the parameters of the tool a are no JSON schema",
    ),
    "a description that is a number": (
        [{"type": "function", "function": {"name": "a", "description": 7}}],
        "the description of the tool a is no text",
    ),
    "one name twice": ([CLOCK, CLOCK], "two tools have the same name"),
    "very long": (
        [{"type": "function", "function": {"name": "a", "description": "x" * (1 << 18)}}],
        "bytes as JSON; 262144 are possible",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tools(name: str) -> None:
    with pytest.raises(BadRequest, match=WRONG[name][1]):
        read_tools(WRONG[name][0])


def test_choices() -> None:
    for choice in ("auto", "none", "required", "clock"):
        assert read_choice(choice, TOOLS) == choice
    assert read_choice({"type": "function", "function": {"name": "clock"}}, TOOLS) == "clock"
    for wrong in ("bomb", 7, {"function": "clock"}):
        with pytest.raises(BadRequest, match="it takes auto, none, required, or the name of a tool"):
            read_choice(wrong, TOOLS)
    with pytest.raises(BadRequest, match="tool_choice is 'required'"):
        read_choice("required", ())


def test_styles_of_templates() -> None:
    assert style_of("{{ messages }}") == HERMES
    assert style_of("{% if tools %}<tool_call>{% endif %}") == HERMES
    assert style_of("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]") == MISTRAL
    assert style_of("{% if tools is not none %}Environment: ipython{% endif %}") == LLAMA


def test_a_template_that_knows_no_tools_says_them_in_words() -> None:
    text = ModelText(Limits())
    text.read_tokenizer(byte_tokenizer().to_str().encode(), None)
    text.read_template(b"{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]},
        {"role": "tool", "content": "noon"},
    ]
    shown = text.render(turns, TOOLS)
    assert shown.startswith("[system]You may call functions")
    assert '"name": "weather"' in shown
    assert '[assistant]<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>' in shown
    assert shown.endswith("[user]<tool_response>\nnoon\n</tool_response>")
    assert told([{"role": "system", "content": "Be kind."}], TOOLS)[0]["content"].startswith("Be kind.\n\nYou may")
    text.read_template(
        b"{% for tool in tools or [] %}({{ tool.function.name }}){% endfor %}{{ messages[0].content }}"
    )
    assert text.render(turns, TOOLS) == "(weather)(clock)Hi"
    assert text.render(turns) == "Hi"
