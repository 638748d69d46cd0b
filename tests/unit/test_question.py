"""A question is read once, whoever asks it: what may stand in it, and the sentence when it may not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshnode.api.question import (
    MAX_CHARACTERS,
    MAX_STOPS,
    MAX_TURNS,
    RANGES,
    Question,
    question,
    read_question,
)
from meshnode.cli.main import main
from meshnode.core.errors import BadRequest, Declined
from protocols.codec import encode
from protocols.pipe.messages import Sampling

HELLO = {"prompt": "hello"}


def turn(role: Any = "user", content: Any = "hello") -> dict[str, Any]:
    return {"role": role, "content": content}


def test_what_people_write_becomes_a_question() -> None:
    hello = ({"role": "user", "content": "hello"},)
    assert question("hello") == Question(messages=hello)
    assert question("hello", {"raw": True}) == Question(prompt="hello")
    assert question([5, 6, 7]) == Question(token_ids=(5, 6, 7))
    assert question(list(hello), {"stop": "\n", "seed": None}) == Question(messages=hello, stop=("\n",))


def test_a_question_is_the_same_after_its_way_through_json() -> None:
    asked = question(
        [turn("system", "be brief"), turn()],
        {
            "max_tokens": 7,
            "temperature": 1,
            "top_p": 0.5,
            "top_k": 3,
            "repetition_penalty": 1.1,
            "seed": 9,
            "stop": ["a"],
        },
    )
    assert read_question(json.loads(json.dumps({"do": "generate", **asked.as_json()}))) == asked


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
            repetition_milli=round(low_or_high["repetition_penalty"] * 1000),
        )
        assert encode(sampling)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "either a prompt, or messages, or token_ids"),
    "two things": ({**HELLO, "token_ids": [1]}, "only one of them"),
    "no text": ({"prompt": 7}, "prompt is a text"),
    "an empty prompt": ({"prompt": ""}, "empty"),
    "half a character": ({"prompt": "a\ud800"}, "character 1 of a text is half a surrogate pair"),
    "half a character in a turn": ({"messages": [turn(content="\udfff")]}, "half a surrogate pair"),
    "half a character in a stop": ({**HELLO, "stop": ["\udfff"]}, "half a surrogate pair"),
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
    "a negative seed": ({**HELLO, "seed": -1}, "seed is -1"),
    "an enormous seed": ({**HELLO, "seed": 1 << 80}, "seed is 1208925819614629174706176"),
    "an empty stop": ({**HELLO, "stop": [""]}, "1 to 256 characters"),
    "a long stop": ({**HELLO, "stop": ["x" * 257]}, "1 to 256 characters"),
    "too many stops": ({**HELLO, "stop": ["x"] * (MAX_STOPS + 1)}, f"up to {MAX_STOPS} texts"),
    "a stop that is a number": ({**HELLO, "stop": 7}, "stop takes"),
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
    ],
)
def test_the_command_line_says_the_same_without_asking_a_node(
    flags: list[str], options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadRequest) as caught:
        question("hello", options)
    assert main(["generate", "hello", *flags, "--data", "/nowhere"]) == BadRequest.exit_code
    assert capsys.readouterr().err == f"meshnode: {caught.value}\n"
