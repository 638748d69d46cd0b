"""A question is read once, whoever asks it: what may stand in it, and the sentence when it may not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshnode.cli.main import main
from meshnode.core.errors import BadRequest, Declined
from meshnode.text.question import (
    MAX_CHARACTERS,
    MAX_STOPS,
    MAX_TURNS,
    RANGES,
    Question,
    question,
    read_question,
)
from protocols.codec import encode
from protocols.ids import DAG_CBOR, RAW, cid_of
from protocols.pipe.messages import Sampling

HELLO = {"prompt": "hello"}
ADAPTER = cid_of(DAG_CBOR, b"an adapter")


def turn(role: Any = "user", content: Any = "hello") -> dict[str, Any]:
    return {"role": role, "content": content}


def test_what_people_write_becomes_a_question() -> None:
    hello = ({"role": "user", "content": "hello"},)
    assert question("hello") == Question(messages=hello)
    assert question("hello", {"raw": True}) == Question(prompt="hello")
    assert question([5, 6, 7]) == Question(token_ids=(5, 6, 7))
    assert question("hello", {"adapter": "none"}) == Question(messages=hello, adapter="none")
    assert question(list(hello), {"stop": "\n", "seed": None}) == Question(messages=hello, stop=("\n",))


def test_a_question_is_the_same_after_its_way_through_json() -> None:
    asked = question(
        [turn("system", "be brief"), turn()],
        {
            "max_tokens": 7,
            "temperature": 1,
            "top_p": 0.5,
            "top_k": 3,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "presence_penalty": -0.5,
            "frequency_penalty": 0.5,
            "logprobs": 3,
            "seed": 9,
            "stop": ["a"],
            "adapter": ADAPTER,
        },
    )
    assert read_question(json.loads(json.dumps({"do": "generate", **asked.as_json()}))) == asked


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({"json_schema": {"type": "string", "pattern": "ü"}}, ("json_schema", '{"type": "string", "pattern": "ü"}')),
        ({"json_schema": "true"}, ("json_schema", "true")),
        ({"json_object": True}, ("json_object", "")),
        ({"json_object": False, "regex": "a|b"}, ("regex", "a|b")),
        ({"grammar": 'start: "a"'}, ("lark", 'start: "a"')),
        ({}, None),
    ],
)
def test_an_answer_can_be_asked_for_in_a_form(options: dict[str, Any], form: tuple[str, str] | None) -> None:
    asked = question("hi", options)
    assert asked.form == form
    assert read_question(json.loads(json.dumps(asked.as_json()))) == asked


CLOCK = {"type": "function", "function": {"name": "clock"}}


def test_a_conversation_with_tools() -> None:
    """Arguments of calls become objects, as templates take them; what is not known of a turn is left out."""
    called = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "CET"}'}}
    turns = [
        turn(),
        {"role": "assistant", "content": None, "tool_calls": [called], "refusal": None},
        {"role": "tool", "content": "noon", "tool_call_id": "c1", "name": "clock"},
    ]
    asked = question(turns, {"tools": [CLOCK], "tool_choice": "required"})
    assert asked.messages is not None
    assert asked.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}}],
    }
    assert asked.messages[2] == turns[2]
    assert (asked.tools[0]["function"]["name"], asked.tool_choice) == ("clock", "required")
    assert read_question(json.loads(json.dumps(asked.as_json()))) == asked


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_a_range_can_be_used(name: str) -> None:
    for value in RANGES[name]:
        assert getattr(read_question({**HELLO, name: value}), name) == value


def test_the_ranges_are_those_of_the_wire() -> None:
    for end in (0, 1):
        low_or_high = {name: ends[end] for name, ends in RANGES.items()}
        sampling = Sampling(
            seed=int(low_or_high["seed"]),
            temperature_milli=round(low_or_high["temperature"] * 1000),
            top_k=int(low_or_high["top_k"]),
            top_p_micro=round(low_or_high["top_p"] * 1_000_000),
            min_p_micro=round(low_or_high["min_p"] * 1_000_000),
            repetition_milli=round(low_or_high["repetition_penalty"] * 1000),
            presence_milli=round(low_or_high["presence_penalty"] * 1000),
            frequency_milli=round(low_or_high["frequency_penalty"] * 1000),
            chances=1 + int(low_or_high["logprobs"]),
        )
        assert encode(sampling)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "either a prompt, or messages, or token_ids"),
    "two things": ({**HELLO, "token_ids": [1]}, "only one of them"),
    "no text": ({"prompt": 7}, "prompt is a text"),
    "an empty prompt": ({"prompt": ""}, "empty"),
    "half a character": ({"prompt": "a\ud800"}, "character 1 of a text is no character: it was not UTF-8"),
    "half a character in a turn": ({"messages": [turn(content="\udfff")]}, "no character: it was not UTF-8"),
    "half a character in a stop": ({**HELLO, "stop": ["\udfff"]}, "no character: it was not UTF-8"),
    "no turns": ({"messages": []}, f"1 to {MAX_TURNS}"),
    "too many turns": ({"messages": [turn()] * (MAX_TURNS + 1)}, f"1 to {MAX_TURNS}"),
    "a turn that is a text": ({"messages": ["hello"]}, "a message has a role (assistant, system, tool, user)"),
    "an unknown role": ({"messages": [turn("king")]}, "a message has a role"),
    "a role that is a list": ({"messages": [turn(["user"])]}, "a message has a role"),
    "a turn without content": ({"messages": [turn(content=None)]}, "a content in text"),
    "no token ids": ({"token_ids": []}, "token_ids"),
    "token ids in a text": ({"token_ids": "12"}, "token_ids"),
    "a token id that is true": ({"token_ids": [True]}, "True is not a token id"),
    "a negative token id": ({"token_ids": [-1]}, "-1 is not a token id"),
    "a large token id": ({"token_ids": [1 << 24]}, "is not a token id"),
    "a token id in many letters": ({"token_ids": ["x" * 100_000]}, "is not a token id"),
    "no tokens": ({**HELLO, "max_tokens": 0}, "max_tokens is 0; it takes a whole number from 1 to"),
    "a share of a token": ({**HELLO, "max_tokens": 1.5}, "max_tokens is 1.5"),
    "tokens that are true": ({**HELLO, "max_tokens": True}, "max_tokens is True"),
    "a hot temperature": ({**HELLO, "temperature": 99}, "temperature is 99; it takes a number from 0 to 10"),
    "a negative temperature": ({**HELLO, "temperature": -1.0}, "temperature is -1;"),
    "a temperature that is no number": ({**HELLO, "temperature": float("nan")}, "temperature is nan"),
    "an infinite temperature": ({**HELLO, "temperature": float("inf")}, "temperature is inf"),
    "a temperature in words": ({**HELLO, "temperature": "x" * 1000}, "temperature is 'xxx"),
    "nothing to choose from": ({**HELLO, "top_p": 0}, "top_p is 0;"),
    "a negative top-k": ({**HELLO, "top_k": -1}, "top_k is -1"),
    "a penalty of zero": ({**HELLO, "repetition_penalty": 0}, "repetition_penalty is 0"),
    "a presence out of range": ({**HELLO, "presence_penalty": 2.5}, "presence_penalty is 2.5; it takes a number"),
    "too many logprobs": ({**HELLO, "logprobs": 21}, "logprobs is 21; it takes a whole number from 0 to 20"),
    "two forms": ({**HELLO, "regex": "a", "json_object": True}, "takes one form, and not json_object and regex"),
    "a form that is a number": ({**HELLO, "regex": 7}, "regex is a text, and not an empty one"),
    "an empty schema": ({**HELLO, "json_schema": ""}, "json_schema is a text or an object"),
    "an object that is a text": ({**HELLO, "json_object": "yes"}, "json_object is true or false"),
    "a long grammar": ({**HELLO, "grammar": "ü" * 32769}, "grammar has more than 65536 bytes"),
    "tools without a chat": ({**HELLO, "tools": [CLOCK]}, "tools are for chats"),
    "a choice without tools": ({**HELLO, "tool_choice": "required"}, "tool_choice is 'required'"),
    "a call in another form": (
        {"messages": [turn()], "tools": [CLOCK], "tool_choice": "clock", "json_object": True},
        "takes no other form",
    ),
    "a call that is none": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [7]}]},
        "tool_calls is a list of calls",
    ),
    "arguments that are no object": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[1]"}}]}]},
        "the arguments of a call of a are no JSON object",
    ),
    "a tool's id that is a number": (
        {"messages": [{"role": "tool", "content": "a", "tool_call_id": 7}]},
        "tool_call_id of a message is a text",
    ),
    "a negative seed": ({**HELLO, "seed": -1}, "seed is -1"),
    "an enormous seed": ({**HELLO, "seed": 1 << 80}, "seed is 1208925819614629174706176"),
    "an empty stop": ({**HELLO, "stop": [""]}, "1 to 256 characters"),
    "a long stop": ({**HELLO, "stop": ["x" * 257]}, "1 to 256 characters"),
    "too many stops": ({**HELLO, "stop": ["x"] * (MAX_STOPS + 1)}, f"up to {MAX_STOPS} texts"),
    "a stop that is a number": ({**HELLO, "stop": 7}, "stop takes"),
    "an adapter that is none": ({**HELLO, "adapter": "best"}, "adapter is 'best'; it takes the CID of an adapter"),
    "an adapter that is empty": ({**HELLO, "adapter": ""}, "adapter is ''; it takes the CID"),
    "an adapter that is a number": ({**HELLO, "adapter": 7}, "adapter is 7; it takes the CID"),
    "an adapter that is a file": ({**HELLO, "adapter": cid_of(RAW, b"x")}, "begins with bafyrei, or none"),
    "an adapter in many letters": ({**HELLO, "adapter": "b" * 100_000}, "adapter is 'bbb"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_question_gets_one_short_sentence(what: str) -> None:
    request, words = WRONG[what]
    with pytest.raises(BadRequest) as caught:
        read_question(request)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "request_", [{"prompt": "x" * (MAX_CHARACTERS + 1)}, {"messages": [turn(content="x" * 700_000)] * 2}]
)
def test_a_question_that_is_too_long(request_: dict[str, Any]) -> None:
    with pytest.raises(Declined) as caught:
        read_question(request_)
    assert caught.value.code == "too-long"


def test_an_unknown_option_is_told_with_those_that_there_are() -> None:
    with pytest.raises(BadRequest, match="there is no option temprature; options are max_tokens, temperature, top_p"):
        question("hello", {"temprature": 1})


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--temperature", "99"], {"temperature": 99}),
        (["--max-tokens", "0"], {"max_tokens": 0}),
        (["--seed=-1"], {"seed": -1}),
        (["--stop", ""], {"stop": [""]}),
        (["--adapter", "best"], {"adapter": "best"}),
    ],
)
def test_the_command_line_says_the_same_without_asking_a_node(
    flags: list[str], options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadRequest) as caught:
        question("hello", options)
    assert main(["generate", "hello", *flags, "--data", "/nowhere"]) == BadRequest.exit_code
    assert capsys.readouterr().err == f"meshnode: {caught.value}\n"
