"""From requests in a dialect to questions, and from answers to the dialect: no server, no node."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.api.messages import Answer, Piece
from meshnode.core.errors import Declined
from meshnode.http.anthropic.messages import read_message
from meshnode.http.models import Chosen, choose
from meshnode.http.ollama.asking import read_chat as read_ollama_chat
from meshnode.http.ollama.asking import read_generate
from meshnode.http.openai.chat import read_chat
from meshnode.http.openai.completions import read_completion
from meshnode.http.openai.history import History
from meshnode.http.openai.responses import read_response
from meshnode.http.problems import Problem
from meshnode.http.shorter import Shorter
from meshnode.http.task import Task
from meshnode.services.inference.text import Started
from meshnode.text.question import Question
from tests.http_rig import MODEL, RECEIPT, FakeDoor

CHOSEN = Chosen(MODEL, None)
HELLO = [{"role": "user", "content": "hello"}]
ANSWER = Answer(
    text="Hi there", reason="stop", stopped_by="END", token_ids=(1, 2), prompt_token_ids=(3, 4, 5), receipt=RECEIPT
)
Read = Callable[[dict[str, Any], Chosen, int], Task]

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "Now", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
CLAUDE_TOOL = {"name": "weather", "description": "Now", "input_schema": PARAMETERS}

READERS: dict[str, tuple[Read, dict[str, Any]]] = {
    "chat": (read_chat, {"messages": HELLO}),
    "completion": (read_completion, {"prompt": "hello"}),
    "response": (partial(read_response, History()), {"input": "hello"}),
    "message": (read_message, {"messages": HELLO, "max_tokens": 5}),
    "ollama chat": (read_ollama_chat, {"messages": HELLO}),
    "ollama generate": (read_generate, {"prompt": "hello"}),
}


def read(kind: str, **more: Any) -> Task:
    reader, body = READERS[kind]
    return reader({**body, **more}, CHOSEN, 7)


WRONG: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("chat", {"temperature": 11}, "temperature", "temperature is 11; it takes a number from 0 to 10"),
    ("chat", {"temperature": "hot"}, "temperature", 'temperature is "hot"; it takes'),
    ("chat", {"top_p": 2}, "top_p", "top_p is 2"),
    ("chat", {"max_tokens": 0}, "max_tokens", "max_tokens is 0; it takes a whole number"),
    ("chat", {"max_completion_tokens": True}, "max_completion_tokens", "max_completion_tokens is true"),
    ("chat", {"max_completion_tokens": -1}, "max_completion_tokens", "max_completion_tokens is -1"),
    ("chat", {"messages": []}, "messages", "not an empty one"),
    ("chat", {"messages": [7]}, "messages[0]", "it takes an object"),
    ("chat", {"messages": [{"role": "king", "content": ""}]}, "messages[0].role", "developer, system, user"),
    ("chat", {"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "a text or a list of parts"),
    (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content",
        "this model reads text alone",
    ),
    ("chat", {"stream": "yes"}, "stream", "it takes true or false"),
    ("chat", {"n": 17}, "n", "from 1 to 16"),
    ("chat", {"stop": [1]}, "stop", "stop takes up to"),
    ("chat", {"response_format": {"type": "xml"}}, "response_format", "it takes text, json_object or json_schema"),
    ("chat", {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "a JSON schema"),
    ("chat", {"tools": [{"type": "function"}]}, None, "a function with a name"),
    ("chat", {"tools": [TOOL], "tool_choice": "fly"}, "tool_choice", "or the name of a tool"),
    ("chat", {"logprobs": True, "top_logprobs": 21}, "logprobs", "logprobs is 21"),
    ("chat", {"logit_bias": {"5": 1}}, "logit_bias", "Leave it out"),
    ("completion", {"prompt": 7}, "prompt", "a text, token ids"),
    ("completion", {"prompt": ["a"] * 9, "n": 2}, "prompt", "16 answers are possible"),
    ("completion", {"suffix": "x"}, "suffix", "leave it out"),
    ("response", {"input": []}, "input", "not an empty one"),
    ("response", {"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0"),
    ("response", {"previous_response_id": "resp_9"}, "previous_response_id", "there is no response resp_9"),
    ("response", {"background": True}, "background", "Leave background out"),
    ("message", {"max_tokens": None}, "max_tokens", "Field required"),
    ("message", {"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "messages", "end with user"),
    ("message", {"system": 7}, "system", "a list of blocks"),
    ("ollama chat", {"options": {"num_predict": 0}}, "num_predict", "num_predict is 0"),
    ("ollama chat", {"format": "xml"}, "format", "it takes json, or a JSON schema"),
    ("message", {"tools": [CLAUDE_TOOL], "tool_choice": {"type": "fly"}}, "tool_choice", "auto, any, tool or none"),
    ("ollama generate", {"context": [1]}, "context", "use /api/chat"),
]


@pytest.mark.parametrize(("kind", "more", "param", "sentence"), WRONG)
def test_a_wrong_field_is_named(kind: str, more: dict[str, Any], param: str | None, sentence: str) -> None:
    with pytest.raises(Problem) as caught:
        read(kind, **more)
    assert caught.value.param == param
    assert sentence in caught.value.text


@pytest.mark.parametrize("kind", READERS)
def test_unknown_and_neutral_fields_are_passed_over(kind: str) -> None:
    plain = read(kind).questions
    more = {"user": "me", "metadata": {}, "stop": None, "temperature": None, "keep_alive": -1, "tools": []}
    assert read(kind, **more).questions == plain


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=6,
)
NAMES = (
    *("messages", "prompt", "input", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stop_sequences"),
    *("stream", "n", "best_of", "tools", "tool_choice", "response_format", "stream_options", "options", "system"),
    *("instructions", "previous_response_id", "text", "logprobs", "echo", "raw"),
)


@pytest.mark.parametrize("kind", READERS)
@given(more=st.dictionaries(st.sampled_from(NAMES), json_values, max_size=4))
def test_any_body_is_read_or_refused(kind: str, more: dict[str, Any]) -> None:
    try:
        task = read(kind, **more)
    except Problem as problem:
        assert 400 <= problem.status < 500
        assert problem.text
    else:
        assert task.questions


def test_what_the_dialects_call_otherwise() -> None:
    (question,) = read("chat", max_completion_tokens=9, seed=-1, stop="END", top_p=0, temperature=0).questions
    assert (question.max_tokens, question.seed, question.stop) == (9, (1 << 63) - 1, ("END",))
    assert question.top_p > 0
    options = {"num_predict": 9, "repeat_penalty": 1.5, "seed": -1, "num_ctx": 100}
    (question,) = read("ollama generate", options=options, system="Be kind", stream=False).questions
    assert (question.max_tokens, question.repetition_penalty, question.seed) == (9, 1.5, None)
    assert question.messages == ({"role": "system", "content": "Be kind"}, {"role": "user", "content": "hello"})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = {"system": parts, "messages": [{"role": "user", "content": parts}], "stop_sequences": ["END"]}
    (question,) = read("message", **asked).questions
    assert question.messages == ({"role": "system", "content": "a\nb"}, {"role": "user", "content": "a\nb"})
    assert question.stop == ("END",)
    seeds = [question.seed for question in read("chat", n=3, seed=5).questions]
    assert seeds == [5, 6, 7]
    developer = [{"role": "developer", "content": "Be kind"}, *HELLO]
    (question,) = read("response", input=developer, instructions="Be short").questions
    assert [turn["role"] for turn in question.messages or ()] == ["system", "system", "user"]


def test_adapters_and_other_names_of_models() -> None:
    door = FakeDoor()
    names = (None, "auto", "small", "small:int4", "small:latest", "bafyreismall")
    assert [choose(door, name).model.name for name in names] == ["small"] * len(names)
    assert choose(door, "small@none").adapter == "none"
    with pytest.raises(Problem, match="it serves small") as caught:
        choose(door, "gpt-4")
    assert caught.value.status == 404


def told(task: Task) -> list[Any]:
    """The JSON of a streamed answer."""
    sent = task.feed(0, Started(3, 2)) + task.feed(0, Piece("Hi", 1)) + task.feed(0, Piece("", 2))
    sent += task.feed(0, Piece(" there", -1)) + task.feed(0, ANSWER) + task.end([ANSWER])
    lines = [line.removeprefix("data: ") for line in sent.decode().splitlines() if line and line[:7] != "event: "]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]


def test_every_dialect_tells_what_was_kept_of_the_prompt() -> None:
    chat, response = read("chat").document([ANSWER]), read("response").document([ANSWER])
    assert chat["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    assert response["usage"]["input_tokens_details"] == {"cached_tokens": 2}
    twice = read("completion", prompt=["hello", "you"], n=2).document([ANSWER] * 4)
    assert twice["usage"]["prompt_tokens"] == 6
    assert twice["usage"]["prompt_tokens_details"]["cached_tokens"] == 4, "every prompt counts once"


def test_streams_say_the_same_as_whole_answers() -> None:
    chat = told(read("chat", stream=True, stream_options={"include_usage": True}))
    assert [part["choices"][0]["delta"].get("content") for part in chat[:4]] == ["", "Hi", " there", None]
    assert chat[3]["choices"][0]["finish_reason"] == "stop"
    assert chat[4]["usage"] == read("chat").document([ANSWER])["usage"]
    assert chat[5] == "[DONE]"
    message = told(read("message", stream=True))
    assert [part["type"] for part in message] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    whole = read("message").document([ANSWER])
    assert message[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "END"}
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "END")
    for usage in (message[0]["message"]["usage"], message[-2]["usage"], whole["usage"]):
        assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (1, 2), "they add up to the prompt"
    response = told(read("response", stream=True))
    assert response[-1]["response"]["output"][0]["content"][0]["text"] == "Hi there"
    assert response[-1]["type"] == "response.completed"
    assert [part["sequence_number"] for part in response] == list(range(len(response)))
    lines = told(read("ollama chat"))
    assert "".join(line["message"]["content"] for line in lines) == "Hi there"
    assert (lines[-1]["done_reason"], lines[-1]["eval_count"]) == ("stop", 2)


def test_a_conversation_goes_on_until_it_is_forgotten() -> None:
    history = History()
    first = read_response(history, {"input": "hello", "instructions": "Be short"}, CHOSEN, 7)
    document = first.document([ANSWER])
    next_ = read_response(history, {"input": "and?", "previous_response_id": document["id"]}, CHOSEN, 8)
    turns = [turn["content"] for turn in next_.questions[0].messages or ()]
    assert turns == ["hello", "Hi there", "and?"]
    read_response(history, {"input": "x", "store": False}, CHOSEN, 7).document([ANSWER])
    for _ in range(256):
        read_response(history, {"input": "x"}, CHOSEN, 7).document([ANSWER])
    with pytest.raises(Problem, match="there is no response"):
        history.find(document["id"])


async def test_a_length_without_room_is_halved_until_it_fits() -> None:
    lengths: list[int] = []
    door = FakeDoor()

    async def ask(question: Question) -> Any:
        lengths.append(question.max_tokens)
        if question.max_tokens > 1000:
            raise Declined("too-long", "no room", peer=None if alone else "B")  # type: ignore[arg-type]
        async for event in door.ask(question):
            yield event

    alone, now = False, 0.0
    shorter = Shorter(lambda: now)
    question = Question(prompt="x", max_tokens=32_000)
    events = [event async for event in shorter.ask(ask, question, 8000)]
    assert isinstance(events[-1], Answer)
    assert lengths == [8000, 4000, 2000, 1000]
    _ = [event async for event in shorter.ask(ask, question, 8000)]
    assert lengths[4:] == [1000]
    now = 301.0
    alone = True
    with pytest.raises(Declined, match="no room"):
        _ = [event async for event in shorter.ask(ask, question, 8000)]
    assert lengths[5:] == [8000]


def test_tools_are_the_same_in_every_dialect() -> None:
    asked = [
        read("chat", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}}),
        read(
            "response",
            tools=[{"type": "function", **FUNCTION}, {"type": "web_search"}],
            tool_choice={"type": "function", "name": "weather"},
        ),
        read("message", tools=[CLAUDE_TOOL], tool_choice={"type": "tool", "name": "weather"}),
    ]
    for task in asked:
        assert task.questions[0].tools == (TOOL,)
        assert task.questions[0].tool_choice == "weather"
    assert read("ollama chat", tools=[TOOL]).questions[0].tools == (TOOL,)
    assert read("message", tools=[CLAUDE_TOOL], tool_choice={"type": "any"}).questions[0].tool_choice == "required"


def test_what_tools_gave_goes_back_to_the_model() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    chat = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    chat.append({"role": "tool", "tool_call_id": "c1", "content": "sunny"})
    items = [
        *HELLO,
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    blocks = [
        *HELLO,
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Rome"}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "sunny"}]},
    ]
    turns = read("chat", messages=chat).questions[0].messages
    assert turns is not None
    assert turns[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert turns[2] == {"role": "tool", "content": "sunny", "tool_call_id": "c1"}
    assert read("response", input=items).questions[0].messages == turns
    assert read("message", messages=blocks).questions[0].messages == turns


def test_forms_are_the_same_in_every_dialect() -> None:
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
    flat = {"type": "json_schema", "name": "x", "schema": PARAMETERS}
    forms = [
        read("chat", response_format=named),
        read("completion", response_format=named),
        read("response", text={"format": flat}),
        read("message", output_config={"format": flat}),
        read("ollama chat", format=PARAMETERS),
        read("ollama generate", format=PARAMETERS),
    ]
    (form,) = {task.questions[0].form for task in forms}
    assert form is not None
    assert json.loads(form[1]) == PARAMETERS
    assert read("chat", response_format={"type": "json_object"}).questions[0].form == ("json_object", "")
    assert read("ollama chat", format="json").questions[0].form == ("json_object", "")
