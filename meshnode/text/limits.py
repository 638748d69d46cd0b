"""What a model's tokenizer and chat template may use, and how the kernel is told so."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_MIB: Final = 1 << 20
ADDRESSES: Final = 1 << 31  # that are reserved for the heaps of threads and never touched


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Seconds and bytes. An honest prompt of a million characters takes 0.6 s and 190 MB, a vocabulary of 262,144
    words 2 s and 500 MB to read; a small device is ten times as slow."""

    load_cpu_s: int = 30
    load_s: float = 120.0
    load_bytes: int = 1024 * _MIB  # on top of what a fresh process has
    template_bytes: int = 128 * _MIB  # on top of the tokenizer, while the template is compiled
    cpu_s: int = 5  # for one question
    walk_cpu_s: int = 60  # for a grammar and all tokens of one answer: 0.3 ms a token, and some devices are slow
    wall_s: float = 30.0
    bytes: int = 384 * _MIB  # on top of tokenizer and template
    reused_cpu_s: int = 1  # a fork that has computed for longer takes no further question,
    reused_bytes: int = 32 * _MIB  # nor one that has grown by more
    at_once: int = 4  # questions; others wait
    text_characters: int = 8 << 20  # that a template may make of one conversation
    tokens: int = 1 << 20  # of one prompt


def limit_memory(more: int) -> None:
    """Let this process grow by so many bytes of writable memory, until it is told otherwise.

    Only Linux tells what it has, and keeps it to that.
    """
    if sys.platform == "linux":
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        for kind, name, spare in ((resource.RLIMIT_DATA, "VmData", 0), (resource.RLIMIT_AS, "VmSize", ADDRESSES)):
            _, hard = resource.getrlimit(kind)
            resource.setrlimit(kind, ((int(status[name].split()[0]) << 10) + more + spare, hard))


def limit_computing(seconds: int) -> None:
    """Let this process compute for so long from now on; then the kernel ends it (SIGXCPU)."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds, hard))


def no_limit_of_computing() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


def for_good() -> None:
    """What is limited now stays so: this process can't allow itself more again."""
    for kind, more in ((resource.RLIMIT_DATA, 0), (resource.RLIMIT_AS, 0), (resource.RLIMIT_CPU, 1)):
        soft, _ = resource.getrlimit(kind)  # at the hard limit of computing comes SIGKILL, which would tell less
        resource.setrlimit(kind, (soft, soft if soft == resource.RLIM_INFINITY else soft + more))
