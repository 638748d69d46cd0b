"""Tokenizers and chat templates of strangers on running nodes: who asks gets a sentence, and the node lives."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from meshnode.client import Client
from meshnode.core.errors import Declined, MeshError, NodeError
from meshnode.harness.member import Member
from meshnode.harness.mesh import Mesh
from tests.process.mesh_rig import mesh_of, small_model
from tests.text_files import byte_tokenizer, computed

pytestmark = [pytest.mark.process, pytest.mark.slow]

BOMB: Final = [{"role": "user", "content": "bomb"}]
PLAIN: Final = [{"role": "user", "content": "w1 w2"}]
LOOP: Final = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MEMORY: Final = "{{ ('a' * (2000000000 * messages|length))|length }}"
TEMPLATE: Final = (
    "{% if messages[0].content == 'bomb' %}"
    + LOOP
    + "{% elif messages[0].content == 'memory' %}"
    + MEMORY
    + "{% else %}{{ messages[0].content }}{% endif %}"
)
WAIT_S: Final = 30.0


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("text")
    with mesh_of(folder, 2, published=small_model(folder / "release", template=TEMPLATE)) as made:
        yield made


def answered(member: Member, turns: list[dict[str, str]] = PLAIN) -> str:
    return member.client.generate(turns, max_tokens=4, temperature=0).text


def text_process(member: Member) -> psutil.Process:
    """The tokenizer's process of a node, not a fork of it."""
    node = member.process()
    assert node is not None
    living = [child for child in node.children() if child.status() != psutil.STATUS_ZOMBIE]
    return next(child for child in living if "meshnode.text.child" in " ".join(child.cmdline()))


def test_a_bomb_costs_its_asker_a_sentence_and_others_nothing(mesh: Mesh) -> None:
    member = mesh.members[0]
    wanted = answered(member)
    node = member.process()
    with ThreadPoolExecutor(2) as threads:
        bomb = threads.submit(answered, member, BOMB)
        others = 0
        while not bomb.done():
            assert answered(member) == wanted
            others += 1
        with pytest.raises(Declined, match=r"chat template of small-noise computed for more than 5 s"):
            bomb.result()
    assert others
    with pytest.raises(Declined, match="wants more than 384 MiB of memory"):
        answered(member, [{"role": "user", "content": "memory"}])
    assert member.process() == node
    assert answered(member) == wanted


def test_who_leaves_takes_the_work_with_them(mesh: Mesh) -> None:
    member = mesh.members[0]
    answered(member)
    impatient = Client(member.folder, timeout=1.0)
    with pytest.raises(NodeError, match="did not answer within 1 s"):
        impatient.generate(BOMB, max_tokens=4)
    process = text_process(member)
    ends = time.monotonic() + WAIT_S
    while any(computed(fork) > 0.5 for fork in process.children()):
        assert time.monotonic() < ends


def test_a_tokenizer_that_is_killed_comes_back(mesh: Mesh) -> None:
    member = mesh.members[1]
    wanted = answered(member)
    before = text_process(member)
    before.kill()
    ends = time.monotonic() + WAIT_S
    while before.is_running() and before.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < ends
    assert answered(member) == wanted
    assert text_process(member).pid != before.pid


def test_the_tokenizer_ends_with_its_node(mesh: Mesh) -> None:
    member = mesh.members[1]
    answered(member)
    process = text_process(member)
    member.signal(9)
    member.wait_stopped()
    process.wait(WAIT_S)
    member.launch()
    member.wait_answers()
    mesh.wait_ready(60)
    assert isinstance(answered(member), str)


def panics() -> str:
    """The library panics when it meets many letters a."""
    made: dict[str, Any] = json.loads(byte_tokenizer().to_str())
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pattern, made["pre_tokenizer"]]}
    return json.dumps(made)


def test_a_tokenizer_that_panics_ends_no_node(tmp_path: Path) -> None:
    released = small_model(tmp_path / "release", template="{{ messages[0].content }}")
    (released / "tokenizer.json").write_text(panics())
    index = json.loads((released / "index.json").read_text())
    index["files"]["tokenizer.json"]["size"] = len(panics())
    index["architecture"]["vocab"] = 300
    (released / "index.json").write_text(json.dumps(index))
    with mesh_of(tmp_path, 1, published=released) as mesh:
        member = mesh.members[0]
        node = member.process()
        for _ in range(3):
            with pytest.raises(MeshError, match="tokenizer failed on this text"):
                answered(member, [{"role": "user", "content": "a" * 60 + "b"}])
        assert member.process() == node
        assert isinstance(answered(member, [{"role": "user", "content": "xyz"}]), str)
