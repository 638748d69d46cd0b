"""What a person asks of a running mesh: several questions at once, ends, seeds, and clients that go away."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from meshnode.core.paths import Paths
from meshnode.harness.member import Member, clean_environment
from meshnode.harness.mesh import Mesh
from meshnode.harness.receipt import ask as question
from protocols.pipe.messages import Sampling
from tests.model.real_mesh import Alone, alone, ask, asked, real_mesh, wait_until

pytestmark = [pytest.mark.model, pytest.mark.process, pytest.mark.slow]

Json = dict[str, Any]
COUNT = "Count from one to five in words, separated by commas."


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with real_mesh("int4", 3) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def single() -> Alone:
    return alone("int4")


def cli(member: Member, *arguments: str, receipt: Path | None = None) -> tuple[str, Json]:
    """What `meshnode generate` prints, and its receipt."""
    command = [sys.executable, "-m", "meshnode", "generate", "--data", str(member.folder), *arguments]
    if receipt is not None:
        command += ["--json", str(receipt)]
    done = subprocess.run(
        command, check=True, timeout=120, capture_output=True, encoding="utf-8", env=clean_environment()
    )
    return done.stdout, {} if receipt is None else json.loads(receipt.read_text(encoding="utf-8"))


def sessions_of(mesh: Mesh) -> list[int]:
    """Of each node: answers it waits for and, as its advert says, sessions that pass through it."""
    return [n for status in (m.status() for m in mesh.serving) for n in (status.sessions, status.me.sessions)]


# ---------------------------------------------------------------- prompts that begin alike


@pytest.mark.parametrize(
    ("temperature", "sampling"),
    [(0, Sampling(seed=0)), pytest.param(0.9, Sampling(seed=7, temperature_milli=900), marks=pytest.mark.long)],
)
def test_the_turns_of_a_chat_go_on_from_what_was_kept(
    mesh: Mesh, single: Alone, temperature: float, sampling: Sampling
) -> None:
    """Bit for bit: three turns have the tokens of a process that computes every prompt anew."""
    member = mesh.serving[1]
    prompt, expected = list(range(2000 + sampling.seed, 2301 + sampling.seed)), 0
    for _ in range(3):
        answer = ask(member, token_ids=prompt, max_tokens=24, temperature=temperature, seed=sampling.seed, top_p=1.0)
        assert answer["cached_tokens"] == expected
        assert answer["token_ids"] == single.answer(prompt, 24, sampling)
        expected = len(prompt)
        prompt += [*answer["token_ids"], *range(500, 521)]
    other = ask(mesh.serving[0], token_ids=prompt, max_tokens=24, temperature=0)
    assert other["cached_tokens"] == 0, "another node has not asked that"


# ---------------------------------------------------------------- several at once, and going away


@pytest.mark.long
def test_questions_at_once_get_the_answers_of_questions_alone(mesh: Mesh, single: Alone) -> None:
    """Four from every side, greedy and sampled, with and without an end before their length."""
    requests: list[Json] = [
        {"token_ids": list(range(100, 140)), "max_tokens": 48},
        {
            "prompt": "The sea was calm that night, and",
            "max_tokens": 48,
            "temperature": 0.9,
            "seed": 7,
            "top_p": 0.95,
        },
        {"messages": [{"role": "user", "content": COUNT}], "max_tokens": 48, "stop": ["three"]},
        {"token_ids": list(range(1000, 1300)), "max_tokens": 48, "temperature": 1.0, "seed": 8},
    ]
    askers = [mesh.serving[0], mesh.serving[0], mesh.serving[1], mesh.serving[2]]
    first = [ask(asker, **request) for asker, request in zip(askers, requests, strict=True)]
    greedy = single.answer(requests[0]["token_ids"], 48, Sampling(seed=0))
    assert first[0]["token_ids"] == greedy
    for _ in range(2):
        with ThreadPoolExecutor(len(requests)) as pool:
            running = [pool.submit(ask, asker, **request) for asker, request in zip(askers, requests, strict=True)]
            together = [future.result() for future in running]
        for mine, other in zip(together, first, strict=True):
            for key in ("token_ids", "text", "prompt_token_ids", "reason"):
                assert mine[key] == other[key]
            assert len(mine["route"]) == len(mine["hops"]) == 3  # every receipt is that of its own question
            assert mine["ttft_ms"] > 0


def test_a_client_that_goes_away_frees_every_stage(mesh: Mesh) -> None:
    # a prompt that the model goes on with for long; the answer alone would take many seconds
    request = {"do": "generate", "token_ids": list(range(100, 140)), "max_tokens": 1500, "temperature": 0}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(60)
        client.connect(str(Paths(mesh.serving[1].folder).control_socket))
        client.sendall(json.dumps(request).encode() + b"\n")
        with client.makefile("rb") as lines:
            for _ in range(3):
                assert b"token" in lines.readline()
            wait_until(lambda: sessions_of(mesh) == [0, 1, 1, 1, 0, 1], "one session on every stage")
            for _ in range(3):
                assert b"token" in lines.readline()  # it still runs
    wait_until(lambda: sessions_of(mesh) == [0] * 6, "no session anywhere", 10)
    assert ask(mesh.serving[1], prompt="Hello", max_tokens=4)["reason"] == "length"


# ---------------------------------------------------------------- ends


def test_a_stop_string_ends_the_answer_with_a_whole_receipt(mesh: Mesh) -> None:
    whole = question(mesh, asked(prompt="one, two, three,", max_tokens=24))
    words = whole["text"].split()
    stop = " ".join(words[3:5])  # over more than one token
    cut = question(mesh, asked(prompt="one, two, three,", max_tokens=24, stop=["#", stop]))
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["reason"] == "stop"
    assert cut["token_ids"] == whole["token_ids"][: len(cut["token_ids"])]
    assert len(cut["token_ids"]) < len(whole["token_ids"])
    assert [hop["name"] for hop in cut["hops"]] == [hop["name"] for hop in whole["hops"]]
    assert len(cut["route"]) == 3
    assert cut["decode_tok_s"] > 0


def test_the_command_line_stops_where_it_is_told(mesh: Mesh, tmp_path: Path) -> None:
    asker = mesh.serving[0]
    greedy = ("--raw", "--greedy", "one, two, three,")
    whole, receipt = cli(asker, *greedy, "--max-tokens", "12", receipt=tmp_path / "whole.json")
    assert len(receipt["token_ids"]) == 12
    assert receipt["reason"] == "length"
    assert whole == receipt["text"] + "\n"
    short, receipt = cli(asker, *greedy, "--max-tokens", "5", receipt=tmp_path / "short.json")
    assert len(receipt["token_ids"]) == 5
    assert whole.startswith(short.removesuffix("\n"))
    word = whole.split()[2]
    stopped, receipt = cli(asker, *greedy, "--max-tokens", "12", "--stop", word, receipt=tmp_path / "stop.json")
    assert stopped == whole[: whole.index(word)] + "\n"
    assert receipt["reason"] == "stop"
    assert len(receipt["route"]) == 3


def test_raw_and_system_change_what_is_asked(mesh: Mesh, tmp_path: Path) -> None:
    asker = mesh.serving[0]
    asked = {}
    for name, extra in (("raw", ("--raw",)), ("chat", ()), ("system", ("--system", "Answer in French."))):
        _, receipt = cli(asker, *extra, "--greedy", "--max-tokens", "2", COUNT, receipt=tmp_path / f"{name}.json")
        asked[name] = receipt["prompt_token_ids"]
    turns = [{"role": "system", "content": "Answer in French."}, {"role": "user", "content": COUNT}]
    assert asked["raw"] == ask(asker, prompt=COUNT, max_tokens=1)["prompt_token_ids"]
    assert asked["chat"] == ask(asker, messages=turns[1:], max_tokens=1)["prompt_token_ids"]
    assert asked["system"] == ask(asker, messages=turns, max_tokens=1)["prompt_token_ids"]
    assert len({tuple(ids) for ids in asked.values()}) == 3


# ---------------------------------------------------------------- seeds


def test_a_seed_gives_one_text_on_every_node(mesh: Mesh, single: Alone, tmp_path: Path) -> None:
    words = ("--temperature", "1.1", "--top-k", "50", "--repetition-penalty", "1.2", "--max-tokens", "16", "--raw")
    runs = [
        cli(member, *words, "--seed", seed, "Once upon a time", receipt=tmp_path / "receipt.json")
        for member, seed in zip((*mesh.serving, mesh.serving[0], mesh.serving[0]), "55556", strict=True)
    ]
    assert len({text for text, _ in runs[:4]}) == 1
    assert len({tuple(receipt["token_ids"]) for _, receipt in runs[:4]}) == 1
    assert runs[4][0] != runs[0][0]
    sampling = Sampling(seed=5, temperature_milli=1100, top_k=50, top_p_micro=900_000, repetition_milli=1200)
    prompt = runs[0][1]["prompt_token_ids"]
    assert runs[0][1]["token_ids"] == single.answer(prompt, 16, sampling)
