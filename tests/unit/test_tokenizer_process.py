"""What foreign tokenizers and templates can do: cost their asker an error, and nobody else anything.

Real processes; each bomb is one that the library or the language really has.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
import trio

from meshnode.core.errors import Declined, MeshError, ModelError, TokenizerLost
from meshnode.text.limits import Limits
from meshnode.text.process import TokenizerProcess, open_tokenizer
from tests.long import some
from tests.text_files import byte_tokenizer, computed, text_files

MIB: Final = 1 << 20
# As the limits of a node, but one is at the end of a test's patience with the CPU time.
LIMITS: Final = Limits(wall_s=30.0)
USER: Final = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def opened(folder: Path, limits: Limits = LIMITS, **files: Any) -> AsyncIterator[TokenizerProcess]:
    tokenizer = await open_tokenizer(text_files(folder, **files), limits)
    try:
        yield tokenizer
    finally:
        await tokenizer.aclose()


def forks(tokenizer: TokenizerProcess) -> list[psutil.Process]:
    return list(psutil.Process(tokenizer.pid).children(recursive=True))


# A template that does what the message says: `if` keeps it harmless for the others.
def on_bomb(action: str) -> str:
    return "{% if messages[0].content == 'bomb' %}" + action + "{% else %}ok{% endif %}"


BOMB: Final = [{"role": "user", "content": "bomb"}]

TEMPLATE_BOMBS: Final = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a namespace that never ends": (
        "{% set ns = namespace(n=0) %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{% endfor %}"
    ),
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "a recursive macro": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "a macro that doubles": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "a product of text": "{% set n = messages|length * 2000000000 %}{{ ('a' * n)|length }}",
    "a product of lists": "{% set n = messages|length * 2000000000 %}{{ ([0] * n)|length }}",
    "doubling": (
        "{% set ns = namespace(s='aaaaaaaa') %}"
        "{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"
    ),
    "a width of %": "{{ '%999999999d' % messages|length }}",
    "a width of format": "{{ '{:>999999999}'.format(messages[0].role) }}",
    "a power": "{{ (messages|length + 8) ** (9 ** 9) }}",
    "a power in a loop": (
        "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}"
    ),
    "output without end": (
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}"
    ),
    "center": "{{ messages[0].content|center(999999999) }}",
    "joined": "{{ range(99999)|list|join('a' * 100000) }}",
    "replaced": "{{ ('a' * 100000 * messages|length).replace('a', 'a' * 100000) }}",
    "sorted": "{{ (range(99999)|list * (999 * messages|length))|sort|length }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes by format": "{{ '{0.__class__.__mro__}'.format(raise_exception) }}{{ raise_exception('quiet') }}",
    "globals of a function": "{{ raise_exception.__globals__['os'].system('true') }}",
    "division": "{{ 1 // (messages|length - 1) }}",
    "lipsum": "{{ lipsum(n=99999, min=99999, max=100000) }}",
    "a list in itself": (
        "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}"
    ),
    "tojson without end": (
        "{% set ns = namespace(l=[1]) %}"
        "{% for i in range(40) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l|tojson }}"
    ),
}


@pytest.mark.parametrize(
    "bomb",
    some(TEMPLATE_BOMBS, "nested loops", "range", "a recursive macro", "a product of text", "a macro that doubles"),
)
async def test_a_template_that_runs_wild_costs_its_asker_an_error(bomb: str, tmp_path: Path) -> None:
    """... in a sentence, while others get their answers, and then it is gone."""
    before = psutil.Process().memory_info().rss
    limits = replace(LIMITS, cpu_s=1)
    async with opened(tmp_path, limits, template=on_bomb(TEMPLATE_BOMBS[bomb])) as tokenizer:
        said: list[str] = []

        async def ask() -> None:
            with pytest.raises(Declined) as caught:
                await tokenizer.chat(BOMB)
            assert caught.value.code == "bad-request"
            said.append(str(caught.value))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            for _ in range(8):
                assert tuple(byte_tokenizer().encode("ok").ids) == await tokenizer.chat(USER)
        assert "chat template" in said[0]
        assert "Traceback" not in said[0]
        assert len(said[0]) < 600
        assert tuple(byte_tokenizer().encode("ok").ids) == await tokenizer.chat(USER)
    assert psutil.Process().memory_info().rss < before + 64 * MIB


COMPILE_BOMBS: Final = {
    "a constant": "{{ 'a' * 2000000000 }}",
    "a constant of constants": "{{ ('a' * 1000000)|center(999999999)|length }}",
    "parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "a long sum": "{{ 1" + " + 1" * 100_000 + " }}",
    "lists": "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
    "not": "{{ " + "not " * 100_000 + "1 }}",
    "filters": "{{ 1" + "|abs" * 100_000 + " }}",
}


@pytest.mark.parametrize("bomb", COMPILE_BOMBS)
async def test_a_template_that_is_a_bomb_to_read(bomb: str, tmp_path: Path) -> None:
    try:
        async with opened(tmp_path, template=COMPILE_BOMBS[bomb]) as tokenizer:
            with pytest.raises((Declined, ModelError), match="template"):
                await tokenizer.chat(USER)
    except ModelError as error:
        assert "template" in str(error) or "tokenizer of small" in str(error)


def tokenizer_json(**fields: Any) -> str:
    return json.dumps({**json.loads(byte_tokenizer().to_str()), **fields})


ESCAPES: Final = {
    "classes by attr": "{{ (''|attr('__class__'))|attr('__mro__') }}",
    "globals of the loop": "{{ loop.__class__ }}{{ self.__init__.__globals__ }}",
    "a file": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "a module": "{% import 'os' as os %}{{ os.getcwd() }}",
    "a file that is included": "{% include '/etc/passwd' %}",
    "another template": "{% extends '/etc/passwd' %}",
    "the environment": "{{ joiner.__globals__ }}{{ config }}{{ environment }}",
    "changed in place": "{{ messages.append(1) }}{{ messages.clear() }}",
}


@pytest.mark.parametrize("escape", ESCAPES)
async def test_a_template_gets_nothing_that_is_not_its_own(escape: str, tmp_path: Path) -> None:
    async with opened(tmp_path, template=ESCAPES[escape]) as tokenizer:
        try:
            ids = await tokenizer.chat(USER)
        except Declined as no:
            assert "chat template" in str(no)
        else:
            assert ids == (), "what is unknown is nothing"


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


ENCODE_BOMBS: Final[dict[str, tuple[Callable[[], str], str]]] = {
    "a pattern that panics": (lambda: tokenizer_json(pre_tokenizer=split("(a+)+$")), "a" * 60 + "b"),
    "another": (lambda: tokenizer_json(pre_tokenizer=split("(x+x+)+y")), "x" * 60 + "b"),
    "in the normalizer": (
        lambda: tokenizer_json(
            normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"},
        ),
        "a" * 60 + "b",
    ),
    "one that multiplies": (
        lambda: tokenizer_json(
            normalizer={
                "type": "Sequence",
                "normalizers": [
                    {"type": "Replace", "pattern": {"String": "q"}, "content": "q" * 1000} for _ in range(6)
                ],
            },
        ),
        "qqqq",
    ),
}


@pytest.mark.parametrize("bomb", ENCODE_BOMBS)
async def test_a_tokenizer_that_runs_wild_costs_its_asker_an_error(bomb: str, tmp_path: Path) -> None:
    make, text = ENCODE_BOMBS[bomb]
    async with opened(tmp_path, replace(LIMITS, cpu_s=1), tokenizer=make()) as tokenizer:
        ids = await tokenizer.encode("xyz")
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises((Declined, ModelError), match="tokenizer"):
                    await tokenizer.encode(text)

            nursery.start_soon(ask)
            for _ in range(8):
                assert await tokenizer.encode("xyz") == ids


def added(count: int) -> str:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return tokenizer_json(
        added_tokens=[{"id": 1000 + i, "content": f"<added {i} {'x' * 40}>", **flags} for i in range(count)]
    )


LOAD_BOMBS: Final[dict[str, Callable[[], str]]] = {
    "an added vocabulary": lambda: added(150_000),
    "merges of nothing": lambda: tokenizer_json(
        model={**json.loads(byte_tokenizer().to_str())["model"], "merges": [["no", "such"]]}
    ),
    "merges in a circle": lambda: tokenizer_json(
        model={
            **json.loads(byte_tokenizer().to_str())["model"],
            "vocab": {"a": 0, "aa": 1},
            "merges": [["a", "a"], ["aa", "aa"], ["aaaa", "a"]],
        }
    ),
    "a word of a megabyte": lambda: tokenizer_json(
        model={"type": "WordLevel", "vocab": {"a" * MIB: 0, "b": 1}, "unk_token": "b"}
    ),
    "a huge id": lambda: tokenizer_json(
        model={"type": "WordLevel", "vocab": {"a": 2**32 - 1, "b": 1}, "unk_token": "b"}
    ),
    "deep nesting": lambda: "[" * 1_000_000 + "]" * 1_000_000,
    "nested sequences": lambda: tokenizer_json().replace(
        '"normalizer": null', '"normalizer": ' + '{"type":"Sequence","normalizers":[' * 3000
    ),
    "a pattern that is none": lambda: tokenizer_json(pre_tokenizer=split("(((")),
    "a decoder with a pattern": lambda: tokenizer_json(
        decoder={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}
    ),
    "a decoder of the unknown kind": lambda: tokenizer_json(
        decoder={"type": "CTC", "pad_token": "p", "word_delimiter_token": "|", "cleanup": True}
    ),
}


@pytest.mark.parametrize("bomb", LOAD_BOMBS)
async def test_a_tokenizer_that_is_a_bomb_to_read(bomb: str, tmp_path: Path) -> None:
    """It is refused in a sentence, or does no harm."""
    try:
        async with opened(tmp_path, replace(LIMITS, load_cpu_s=5), tokenizer=LOAD_BOMBS[bomb]()) as tokenizer:
            assert isinstance(await tokenizer.encode("b"), tuple)
            tokenizer.stream().feed(0)
    except ModelError as error:
        assert "tokenizer" in str(error)
        assert len(str(error)) < 700


async def test_a_file_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    files = text_files(tmp_path)
    with files.tokenizer.open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(ModelError, match="1073741824 bytes; 67108864 are possible"):
        await open_tokenizer(files)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (replace(LIMITS, load_cpu_s=1), "more than 1 s of computing"),
        (replace(LIMITS, load_bytes=16 * MIB), "more than 16 MiB of memory"),
    ],
)
async def test_reading_has_limits(limits: Limits, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        await open_tokenizer(text_files(tmp_path, tokenizer=added(150_000)), limits)


async def test_a_long_prompt_is_no_bomb(tmp_path: Path) -> None:
    async with opened(tmp_path) as tokenizer:
        text = "Every device runs the same node. " * 9000
        assert len(await tokenizer.chat([{"role": "user", "content": text}])) > len(text)


async def test_who_goes_away_ends_the_work(tmp_path: Path) -> None:
    async with opened(tmp_path, template=on_bomb(TEMPLATE_BOMBS["nested loops"])) as tokenizer:
        await tokenizer.chat(USER)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tokenizer.chat, BOMB)
            busy = await busy_fork(tokenizer)
            nursery.cancel_scope.cancel()
        await gone(busy)


async def test_time_on_the_clock_is_limited_too(tmp_path: Path) -> None:
    limits = replace(LIMITS, wall_s=0.5)
    async with opened(tmp_path, limits, template=on_bomb(TEMPLATE_BOMBS["nested loops"])) as tokenizer:
        with pytest.raises(Declined, match="took longer than"):
            await tokenizer.chat(BOMB)
        await until(lambda: not any(computed(fork) > 0.1 for fork in forks(tokenizer)))


async def until(true: Callable[[], Any]) -> Any:
    """What it gives as soon as that is true. Other processes tell nobody when they have changed."""
    with trio.fail_after(20):
        while not (found := true()):  # noqa: ASYNC110
            await trio.sleep(0.02)
    return found


async def busy_fork(tokenizer: TokenizerProcess) -> psutil.Process:
    """The fork that computes."""
    before = {fork.pid: computed(fork) for fork in forks(tokenizer)}

    def computing() -> psutil.Process | None:
        return next((fork for fork in forks(tokenizer) if computed(fork) > before.get(fork.pid, 0.0) + 0.1), None)

    found: psutil.Process = await until(computing)
    return found


async def gone(process: psutil.Process) -> None:
    await until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.long
async def test_a_fork_that_is_killed_is_replaced(tmp_path: Path) -> None:
    """Before its question, or once in it: nobody notices. Twice: its asker is told."""
    slow = "{% for i in range(40000) %}{% for j in range(1500) %}{% endfor %}{% endfor %}ok"
    async with opened(tmp_path, template=slow) as tokenizer:
        wanted = tuple(byte_tokenizer().encode("ok").ids)
        assert await tokenizer.chat(USER) == wanted
        for fork in forks(tokenizer):
            fork.kill()
        assert await tokenizer.chat(USER) == wanted
        got: list[Any] = []

        async def ask() -> None:
            try:
                got.append(await tokenizer.chat(USER))
            except MeshError as error:
                got.append(str(error))

        for times, outcome in ((1, wanted), (2, "killed twice")):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                for _ in range(times):
                    busy = await busy_fork(tokenizer)
                    busy.kill()
                    await gone(busy)
            last = got.pop()
            assert last == outcome or (isinstance(last, str) and str(outcome) in last)


async def test_a_fork_serves_many_small_questions_and_one_large(tmp_path: Path) -> None:
    """What one question has used is not missing for the next."""
    async with opened(tmp_path) as tokenizer:
        await tokenizer.encode("a")
        first = await until(lambda: forks(tokenizer))
        for _ in range(20):
            await tokenizer.encode("a")
        assert first[0].pid in [fork.pid for fork in forks(tokenizer)]
        await tokenizer.encode("ä" * 400_000)
        await tokenizer.encode("a")
        await until(lambda: first[0].pid not in [fork.pid for fork in forks(tokenizer)])


async def test_a_process_that_is_killed_takes_its_forks_with_it(tmp_path: Path) -> None:
    async with opened(tmp_path, template=on_bomb(TEMPLATE_BOMBS["nested loops"])) as tokenizer:
        await tokenizer.chat(USER)
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(TokenizerLost):
                    await tokenizer.chat(BOMB)

            nursery.start_soon(ask)
            busy = await busy_fork(tokenizer)
            os.kill(tokenizer.pid, signal.SIGKILL)
        await gone(busy)
        assert tokenizer.lost
        with pytest.raises(TokenizerLost):
            await tokenizer.chat(USER)
        stream = tokenizer.stream()
        assert stream.feed(byte_tokenizer().encode("a").ids[0]) == "a", "answers under way go on"


async def test_nothing_is_left_when_it_is_closed(tmp_path: Path) -> None:
    async with opened(tmp_path) as tokenizer:
        await tokenizer.chat(USER)
        process = psutil.Process(tokenizer.pid)
        left = [process, *forks(tokenizer)]
    for one in left:
        await gone(one)


@pytest.mark.parametrize("questions", [1, 6])
async def test_it_can_be_closed_under_way(questions: int, tmp_path: Path) -> None:
    """Those that are asked, and those that wait for their turn."""
    async with opened(tmp_path, template=on_bomb(TEMPLATE_BOMBS["nested loops"])) as tokenizer:
        await tokenizer.chat(USER)
        process = psutil.Process(tokenizer.pid)
        ends: list[str] = []

        async def ask() -> None:
            try:
                await tokenizer.chat(BOMB)
            except TokenizerLost as error:
                ends.append(str(error))

        async with trio.open_nursery() as nursery:
            for _ in range(questions):
                nursery.start_soon(ask)
            await busy_fork(tokenizer)
            left = [process, *forks(tokenizer)]
            await tokenizer.aclose()
    assert len(ends) == questions
    for one in left:
        await gone(one)


PARENT: Final = """
import sys, trio
from pathlib import Path
from meshnode.text.process import open_tokenizer
from tests.text_files import text_files
async def main():
    tokenizer = await open_tokenizer(text_files(Path(sys.argv[1]), template=sys.argv[2]))
    print(tokenizer.pid, flush=True)
    await tokenizer.chat([{"role": "user", "content": "bomb"}])
trio.run(main)
"""


async def test_it_ends_with_a_node_that_is_killed(tmp_path: Path) -> None:
    template = on_bomb(TEMPLATE_BOMBS["nested loops"])
    command = [sys.executable, "-c", PARENT, str(tmp_path), template]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as node:  # noqa: ASYNC220
        try:
            assert node.stdout is not None
            process = psutil.Process(int(await trio.to_thread.run_sync(node.stdout.readline)))
            family = [process, *(await until(process.children))]
        finally:
            node.kill()
    for one in family:
        await gone(one)


def link(path: Path) -> str:
    return str(path.readlink())


def links_in(folder: Path) -> list[str]:
    return [link(path) for path in folder.iterdir()]


async def test_what_the_process_has_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment, no descriptors, no folder."""
    monkeypatch.setenv("MESHNODE_PASSPHRASE", "secret")
    async with opened(tmp_path) as tokenizer:
        await tokenizer.chat(USER)
        process = psutil.Process(tokenizer.pid)
        assert "secret" not in str(process.environ())
        assert len(process.environ()) < 16
        for one in (process, *forks(tokenizer)):
            assert "(deleted)" in link(Path(f"/proc/{one.pid}/cwd"))
            links = links_in(Path(f"/proc/{one.pid}/fd"))
            files = [file for file in links if file.split(":")[0] not in ("/dev/null", "socket", "anon_inode")]
            assert all("(deleted)" in file for file in files), "the file behind stderr, which has no name"


async def test_questions_at_once_take_turns(tmp_path: Path) -> None:
    async with opened(tmp_path) as tokenizer:
        wanted = tuple(byte_tokenizer().encode("[user]hi[assistant]").ids)
        got: list[tuple[int, ...]] = []

        async def ask() -> None:
            got.append(await tokenizer.chat(USER))

        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(ask)
        assert got == [wanted] * 40
        await until(lambda: len(forks(tokenizer)) <= 3)
