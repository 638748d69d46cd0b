"""Unmodified clients of OpenAI, Anthropic and Ollama ask a mesh of three real nodes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import anthropic
import httpx
import ollama
import openai
import pytest

from meshnode.harness.mesh import FILE, Mesh
from meshnode.text.question import Question
from tests.process.mesh_rig import CONTEXT, mesh_of, small_model, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process]

TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
ASKED = [{"role": "user", "content": "w5 w6 w7"}]
LONG = [{"role": "user", "content": "w5 " * (CONTEXT + 10)}]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("http")
    published = small_model(folder / "model", template=TEMPLATE)
    with mesh_of(folder, 3, published=published, settings=(("serve.layers", 8),)) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def url(mesh: Mesh) -> str:
    """Of a node, as the harness tells it."""
    nodes = json.loads((mesh.folder / FILE).read_text())["nodes"]
    urls = [node["api_url"] for node in nodes]
    assert len(set(urls)) == 3
    assert urls == [member.status().api_url for member in mesh.members]
    return str(urls[1])


@pytest.fixture(scope="module")
def right(mesh: Mesh) -> str:
    """The greedy answer to ASKED in words, as the library gives it."""
    ids = tokens_of(mesh.members[0], Question(token_ids=(5, 6, 7), max_tokens=6, temperature=0))
    return " ".join(f"w{token}" for token in ids)


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def anthropic_client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


class TestOpenAI:
    def test_models(self, url: str) -> None:
        client = openai_client(url)
        (model,) = client.models.list().data
        assert model.id == "small-noise"
        assert client.models.retrieve("small-noise").id == model.id
        with pytest.raises(openai.NotFoundError, match="no model gpt-4"):
            client.models.retrieve("gpt-4")

    def test_chat(self, url: str, right: str) -> None:
        chat = openai_client(url).chat.completions
        whole = chat.create(model="small-noise", messages=ASKED, max_tokens=6, temperature=0)
        assert whole.choices[0].message.content == right
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 6)
        pieces = list(
            chat.create(
                model="auto",
                messages=ASKED,
                max_completion_tokens=6,
                temperature=0,
                n=2,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        for index in range(2):
            mine = [choice for piece in pieces for choice in piece.choices if choice.index == index]
            assert "".join(choice.delta.content or "" for choice in mine) == right
            assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["length"]
            assert mine[0].delta.role == "assistant"
        assert pieces[-1].usage is not None
        assert pieces[-1].usage.completion_tokens == 12

    def test_a_stop_text(self, url: str, right: str) -> None:
        third = right.split()[2]
        chat = openai_client(url).chat.completions
        answer = chat.create(model="auto", messages=ASKED, max_tokens=6, temperature=0, stop=[f" {third}"])
        assert answer.choices[0].message.content == " ".join(right.split()[:2])
        assert answer.choices[0].finish_reason == "stop"

    def test_completions(self, url: str, right: str) -> None:
        answers = openai_client(url).completions
        whole = answers.create(model="auto", prompt="w5 w6 w7", max_tokens=6, temperature=0)
        assert whole.choices[0].text.strip() == right
        pieces = answers.create(model="auto", prompt=[[5, 6, 7]], max_tokens=6, temperature=0, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces).strip() == right

    def test_responses(self, url: str, right: str) -> None:
        responses = openai_client(url).responses
        whole = responses.create(model="auto", input="w5 w6 w7", max_output_tokens=6, temperature=0)
        assert whole.output_text == right
        assert whole.status == "incomplete"
        assert responses.retrieve(whole.id).output_text == right
        probe = responses.create(model="auto", input="w5", max_output_tokens=1)
        assert probe.usage is not None
        assert probe.usage.output_tokens == 1
        events = list(
            responses.create(
                model="auto",
                input="w8",
                previous_response_id=whole.id,
                max_output_tokens=4,
                temperature=0,
                stream=True,
                tools=[{"type": "web_search"}],
            )
        )
        assert events[0].type == "response.created"
        assert [event.sequence_number for event in events] == list(range(len(events)))
        last = events[-1]
        assert last.type == "response.incomplete"
        assert last.response.usage is not None
        assert last.response.usage.input_tokens == 3 + 6 + 1
        with pytest.raises(openai.NotFoundError, match="there is no response resp_0"):
            responses.create(model="auto", input="w8", previous_response_id="resp_0")

    def test_too_long(self, url: str) -> None:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=f"has {CONTEXT + 10} tokens") as caught:
                openai_client(url).chat.completions.create(model="auto", messages=LONG, stream=stream)
            assert caught.value.code == "context_length_exceeded"

    def test_who_did_it_and_whether_it_was_right(self, url: str, mesh: Mesh) -> None:
        raw = openai_client(url).chat.completions.with_raw_response
        answer = raw.create(model="auto", messages=ASKED, max_tokens=6, temperature=0)
        id = answer.headers["x-meshnode-receipt"]
        assert id == answer.parse().id
        receipt = httpx.get(f"{url}/v1/receipts/{id}").json()
        (figures,) = receipt["answers"]
        assert [stage["peer"] for stage in figures["route"]] == [
            part.split(":")[0] for part in answer.headers["x-meshnode-route"].split(", ")
        ]
        assert sorted((stage["first"], stage["last"]) for stage in figures["route"]) == [(0, 8), (8, 16), (16, 24)]
        judged = httpx.post(f"{url}/v1/feedback", json={"answer": id, "correct": False, "label": "w9"})
        assert judged.json()["label"] == "w9"
        assert mesh.members[1].status().samples.labelled == 1

    def test_how_likely_tokens_were(self, url: str, right: str) -> None:
        chat = openai_client(url).chat.completions
        asked = {"model": "auto", "messages": ASKED, "max_tokens": 3, "temperature": 0}
        told = chat.create(**asked, logprobs=True, top_logprobs=2).choices[0].logprobs
        assert told is not None
        assert [part.token.strip() for part in told.content or ()] == right.split()[:3]
        for part in told.content or ():
            assert len(part.top_logprobs) == 2
            assert part.logprob == part.top_logprobs[0].logprob <= 0
        plain = chat.create(**asked, presence_penalty=2.0, frequency_penalty=0.5, extra_body={"min_p": 0.1})
        assert plain.usage is not None

    def test_vectors(self, url: str) -> None:
        made = openai_client(url).embeddings.create(model="auto", input=["w5 w6", "w7"])
        first, second = (part.embedding for part in made.data)
        assert made.usage.prompt_tokens == 3
        for vector in (first, second):
            assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-4)
        assert first != second
        assert list(ollama.Client(host=url).embed(model="auto", input="w7").embeddings[0]) == pytest.approx(second)


class TestAnthropic:
    def test_messages(self, url: str, right: str) -> None:
        client = anthropic_client(url)
        asked = {"model": "small-noise", "max_tokens": 6, "messages": ASKED, "extra_body": {"temperature": 0}}
        whole = client.messages.create(**asked)
        assert whole.content[0].text == right
        assert (whole.stop_reason, whole.usage.input_tokens, whole.usage.output_tokens) == ("max_tokens", 3, 6)
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == right
            last = stream.get_final_message()
        assert (last.stop_reason, last.usage.input_tokens, last.usage.output_tokens) == ("max_tokens", 3, 6)
        stop = " " + right.split()[2]
        stopped = client.beta.messages.create(**asked, system="", stop_sequences=[stop])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)

    def test_counting(self, url: str) -> None:
        client = anthropic_client(url)
        counted = client.messages.count_tokens(model="auto", messages=ASKED, system="w1 w2")
        assert counted.input_tokens == 5
        (model,) = client.models.list().data
        assert (model.id, model.type) == ("small-noise", "model")

    def test_too_long(self, url: str) -> None:
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long: the prompt has"):
            anthropic_client(url).messages.create(model="auto", max_tokens=6, messages=LONG)
        with pytest.raises(anthropic.NotFoundError, match="no model"):
            anthropic_client(url).messages.create(model="claude", max_tokens=6, messages=ASKED)


class TestOllama:
    def test_chat_and_generate(self, url: str, right: str) -> None:
        client = ollama.Client(host=url)
        options = {"num_predict": 6, "temperature": 0}
        whole = client.chat(model="small-noise", messages=ASKED, options=options)
        assert (whole.message.content, whole.done_reason) == (right, "length")
        assert (whole.prompt_eval_count, whole.eval_count) == (3, 6)
        pieces = list(client.chat(model="small-noise:latest", messages=ASKED, options=options, stream=True))
        assert "".join(piece.message.content or "" for piece in pieces) == right
        assert pieces[-1].done
        assert client.generate(model="auto", prompt="w5 w6 w7", options=options).response == right
        assert client.generate(model="auto").done_reason == "load"

    def test_what_is_there(self, url: str) -> None:
        client = ollama.Client(host=url)
        (model,) = client.list().models
        assert model.model == "small-noise:latest"
        assert client.show("small-noise").modelinfo["llama.context_length"] == CONTEXT
        assert len(client.ps().models) == 1
        with pytest.raises(ollama.ResponseError, match="no model"):
            client.chat(model="llama3", messages=ASKED)


def test_a_client_that_leaves_frees_every_stage(url: str, mesh: Mesh) -> None:
    stream = openai_client(url).chat.completions.create(model="auto", messages=ASKED, max_tokens=1900, stream=True)
    next(iter(stream))
    next(iter(stream))
    mesh.members[1].wait_for(lambda status: status.sessions == 1, 20, "the session")
    stream.close()
    mesh.members[1].wait_for(lambda status: status.sessions == 0, 20, "the end of the session")
    left = threading.Event()

    def give_up() -> None:
        with pytest.raises(openai.APITimeoutError):
            client = openai_client(url).with_options(timeout=1.0)
            client.chat.completions.create(model="auto", messages=ASKED, max_tokens=1900)
        left.set()

    thread = threading.Thread(target=give_up)
    thread.start()
    mesh.members[1].wait_for(lambda status: status.sessions == 1, 20, "the session")
    thread.join()
    assert left.is_set()
    mesh.members[1].wait_for(lambda status: status.sessions == 0, 20, "the end of the session")


def test_ready_and_alive(url: str) -> None:
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    ready = httpx.get(f"{url}/readyz")
    assert ready.status_code == 200
    assert "a probe token passed" in ready.json()["readiness"]


def test_a_length_that_nobody_has_room_for_is_shortened(url: str) -> None:
    wanted = {"max_tokens": 32_000, "temperature": 0, "messages": ASKED}
    stream = openai_client(url).chat.completions.create(model="auto", stream=True, **wanted)
    assert [piece.choices[0].delta.content for piece, _ in zip(stream, range(3), strict=False)][1]
    stream.close()
