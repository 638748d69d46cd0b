"""What can be wrong with the processes that look at what others have made: engines, and the reader of questions."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Final

from meshnode.core.sizes import format_size
from meshnode.doctor.finding import Finding, ok, warning, wrong


def check_engine(kind: str, *, took_ms: int, rss: int, problem: str) -> Finding:
    if problem:
        return wrong(
            "engine",
            f"A trial of the {kind} engine failed: {problem}",
            "Install meshnode again into a fresh environment; if that does not help, report this line.",
        )
    return ok(
        "engine",
        f"the {kind} engine started, computed the right token and stopped in {took_ms} ms ({format_size(rss)})",
    )


# parts of a confinement, and what goes on without them
_UNCONFINED: Final = {
    "memory": "take all memory",
    "rights": "use the rights of root, if the node has them",
    "files": "read and write your files",
    "network": "open connections",
    "processes": "start programs",
}


def check_text(problem: str) -> Finding:
    if problem:
        return wrong(
            "text",
            f"A trial of the process that reads questions failed: {problem}",
            "Install meshnode again into a fresh environment; if that does not help, report this line.",
        )
    return ok("text", "the process that reads questions started and read the right tokens")


class Confined(Enum):
    """Which process: what keeps it in its place is what a foreign model breaks out of."""

    ENGINE = ("engines", "ONNX Runtime", "Graphs are checked before they run all the same.")
    TEXT = ("tokenizers and chat templates", "the tokenizer or the chat template", "Its time and memory are bounded.")


def check_confinement(what: Confined, held: Sequence[str], *, system: str, landlock: int, filtered: bool) -> Finding:
    """What keeps a foreign model in its place.

    Args:
      held: parts of the confinement that hold in such a process on this device.
      landlock: ABI of the kernel, 0 for none; `filtered`: there is a seccomp filter for this processor.
    """
    who, library, besides = what.value
    missing = [words for part, words in _UNCONFINED.items() if part not in held]
    means = f"Landlock {f'ABI {landlock}' if landlock else 'missing'}, seccomp {'there' if filtered else 'missing'}"
    if not missing:
        return ok("confinement", f"{who} can do nothing but compute ({means})")
    remedy = (
        "Use Linux 5.13 or newer on x86-64 or ARM64, and don't switch seccomp off in the container."
        if system == "Linux"
        else "Serve models of people you trust, or run the node on Linux, in a container for instance."
    )
    return warning(
        "confinement",
        f"A model that breaks out of {library} could {', '.join(missing)} here ({means}). {besides}",
        remedy,
    )
