"""What the tokenizer's process costs: the same text through it, and through the same code in a thread of our own.

Both sides take turns within one run, after a pause as between two questions.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import psutil
import trio
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from meshnode.bench.machine import machine
from meshnode.publisher.checkpoint import open_checkpoint
from meshnode.text.limits import Limits
from meshnode.text.port import TokenizerFiles
from meshnode.text.process import TokenizerProcess, open_tokenizer
from meshnode.text.tokenizer import ModelText

Json = dict[str, Any]
PAUSE_S: Final = 0.1
QUESTIONS: Final = {"short": 1, "long": 400}  # times a sentence of 10 words
SENTENCE: Final = "Every device runs the same node, and there is no server. "
STREAMED: Final = 2000  # tokens


def measure(source: str, *, rounds: int) -> Json:
    """Run the benchmark with the tokenizer of a model; its figures: milliseconds, microseconds per token, MB."""
    tokenizer, template, special = open_checkpoint(source).tokenizer()
    with tempfile.TemporaryDirectory(prefix="meshnode-bench-") as folder:
        files = _written(Path(folder), tokenizer, template)
        figures = trio.run(_measured, files, rounds)
    return {"source": source, "rounds": rounds, **figures, "special_tokens": special, "machine": machine()}


def _written(folder: Path, tokenizer: str, template: str | None) -> TokenizerFiles:
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (folder / "chat_template.jinja").write_text(template or plain, encoding="utf-8")
    vocab = FastTokenizer.from_str(tokenizer).get_vocab_size()
    return TokenizerFiles(
        model="bench", vocab=vocab, tokenizer=folder / "tokenizer.json", template=folder / "chat_template.jinja"
    )


async def _measured(files: TokenizerFiles, rounds: int) -> Json:
    began = perf_counter()
    process = await open_tokenizer(files)
    opened = perf_counter() - began
    try:
        began = perf_counter()
        text = _in_process(files)
        alone = perf_counter() - began
        figures: Json = {"open_ms": round(opened * 1e3, 1), "open_in_process_ms": round(alone * 1e3, 1)}
        for name, times in QUESTIONS.items():
            figures[name] = await _pair(process, text, [{"role": "user", "content": SENTENCE * times}], rounds)
        figures["stream_us"], figures["library_stream_us"] = _streams(process, files)
        figures["process_mb"], figures["fork_mb"] = _memory(process.pid)
        return figures
    finally:
        await process.aclose()


async def _pair(
    process: TokenizerProcess, text: ModelText, turns: Sequence[Mapping[str, str]], rounds: int
) -> dict[str, float]:
    """Medians of both sides, and of what the process takes longer within a round."""
    sides: dict[str, list[float]] = {"process": [], "thread": []}
    for _ in range(rounds):
        there, tokens = await _timed(lambda: process.chat(turns))
        here, same = await _timed(lambda: trio.to_thread.run_sync(text.chat, turns))
        assert list(tokens) == list(same)
        sides["process"].append(there)
        sides["thread"].append(here)
    more = [there - here for there, here in zip(sides["process"], sides["thread"], strict=True)]
    medians = {f"{name}_ms": round(statistics.median(times), 2) for name, times in sides.items()}
    return {"tokens": len(tokens), **medians, "more_ms": round(statistics.median(more), 2)}


async def _timed(ask: Callable[[], Awaitable[Sequence[int]]]) -> tuple[float, Sequence[int]]:
    await trio.sleep(PAUSE_S)
    began = perf_counter()
    tokens = await ask()
    return (perf_counter() - began) * 1e3, tokens


def _in_process(files: TokenizerFiles) -> ModelText:
    text = ModelText(Limits())
    text.read_tokenizer(files.tokenizer.read_bytes(), None)
    assert files.template is not None
    text.read_template(files.template.read_bytes())
    return text


def _streams(process: TokenizerProcess, files: TokenizerFiles) -> tuple[float, float]:
    """Microseconds per token: plain data in this process, and the library's own stream."""
    fast = FastTokenizer.from_file(str(files.tokenizer))
    tokens = fast.encode(SENTENCE * STREAMED, add_special_tokens=False).ids[:STREAMED]
    ours, theirs = process.stream(), DecodeStream(skip_special_tokens=True)
    began = perf_counter()
    said = "".join([ours.feed(token) for token in tokens]) + ours.rest()
    middle = perf_counter()
    same = "".join([theirs.step(fast, token) or "" for token in tokens])
    ended = perf_counter()
    assert said == same
    return round((middle - began) / len(tokens) * 1e6, 2), round((ended - middle) / len(tokens) * 1e6, 2)


def _memory(pid: int) -> tuple[float, float]:
    """MB of the process, and what the fork that waits has beside it."""
    process = psutil.Process(pid)
    forks = [child.memory_full_info().uss for child in process.children()]
    return round(process.memory_info().rss / 1e6, 1), round(sum(forks) / 1e6, 1)
