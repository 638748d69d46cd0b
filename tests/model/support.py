"""Which models run: every family and every kind of GGUF file, tried out. Writes docs/models.md.

    make models-table

Each is a small random model that is published in fp32, cut into three stages and asked for `COUNT` greedy tokens,
which must be those of transformers; or the publisher refuses it, and its sentence is in the table.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from meshnode.core.errors import ModelError
from tests.model.cutting import Pieces, published, random_checkpoint, reference_greedy
from tests.model.families import ABOUT, ARCHITECTURES, REFUSED, UNBUILT
from tests.model.gguf_cases import CASES, UNKNOWN_KEYS
from tests.model.gguf_files import write_gguf

COUNT: Final = 32  # tokens of an answer
PROMPT: Final = [int(t) for t in np.random.default_rng(3).integers(2, 255, 50)]
CUTS: Final = (1, 3)
FILE: Final = Path(__file__).parents[2] / "docs" / "models.md"


@dataclass(frozen=True)
class Row:
    """What became of one model."""

    name: str
    about: str
    same: int | None  # tokens that are those of transformers; None: refused
    words: str = ""  # of the refusal

    @property
    def good(self) -> bool:
        """Right, or refused."""
        return self.same in (None, COUNT)


def family(name: str) -> Row:
    """Try a family, as a folder."""
    settings = {**ARCHITECTURES, **REFUSED, **UNBUILT}[name]
    kind, _, variant = name.partition("-")
    about = ABOUT[kind] + (f" ({variant})" if variant else "")
    return _try(name, about, kind, settings, lambda model, folder: folder)


def gguf(name: str) -> Row:
    """Try a kind of GGUF file."""
    case = CASES[name]

    def write(model: Any, folder: Path) -> Path:
        file = folder.with_suffix(".gguf")
        more = {"tensors": case.tensors(), "parts": case.parts}
        return write_gguf(model, file, case.architecture, case.keys, **more)[0]

    return _try(name, case.about, case.model_type, case.settings, write)


def gguf_with_unknown_key(architecture: str) -> Row:
    """Try a GGUF file with a setting that nobody honours."""
    key, value = UNKNOWN_KEYS[architecture]
    case = CASES[architecture]

    def write(model: Any, folder: Path) -> Path:
        return write_gguf(model, folder.with_suffix(".gguf"), architecture, {**case.keys, key: value})[0]

    return _try(f"{architecture}.{key}", "a setting that is not honoured", case.model_type, case.settings, write)


def _try(name: str, about: str, kind: str, settings: dict[str, Any], source: Callable[[Any, Path], Path]) -> Row:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        model = random_checkpoint(folder / "in", kind, **settings)
        try:
            published(source(model, folder / "in"), folder / "out", "fp32")
        except ModelError as error:
            return Row(name, about, None, str(error).replace(str(folder), ""))
        ours = Pieces(folder / "out", "fp32", CUTS).greedy(PROMPT, COUNT)
        theirs = reference_greedy(model, PROMPT, COUNT)
    return Row(name, about, sum(a == b for a, b in zip(ours, theirs, strict=True)))


def rows() -> tuple[list[Row], list[Row]]:
    """Families, and kinds of GGUF files."""
    families = [family(name) for name in (*ARCHITECTURES, *REFUSED, *UNBUILT)]
    files = [gguf(name) for name in CASES if CASES[name].kind == "F32"]
    return families, files + [gguf_with_unknown_key(name) for name in UNKNOWN_KEYS]


def table(found: list[Row], first: str) -> str:
    """A table in Markdown: what runs, then what is refused."""
    lines = [f"| {first} | models | tokens like transformers |", "|---|---|---|"]
    lines += [f"| `{r.name}` | {r.about} | {r.same} of {COUNT} |" for r in found if r.same is not None]
    refused = [r for r in found if r.same is None]
    lines += ["", f"| {first} | models | refused |", "|---|---|---|"]
    lines += [f"| `{r.name}` | {r.about} | {_brief(r.words)} |" for r in refused]
    return "\n".join(lines)


def _brief(words: str) -> str:
    """The first sentence, without what is different on every machine."""
    short = re.sub(r"(differ by up to )[\d.e-]+ \(.*?\)", r"\1more than is let through", words)
    short = re.sub(r", by [\d.e-]+ of its output; \d+ of \d+ most likely tokens are the same\..*", ".", short)
    short = re.sub(r"deviates by [\d.e-]+ of its output", "deviates", short)
    return short.replace("|", "\\|")


def main() -> None:
    """Try everything and write the table. Fails when a model is accepted and wrong."""
    families, files = rows()
    wrong = [r.name for r in (*families, *files) if not r.good]
    if wrong:
        raise SystemExit(f"accepted and wrong: {', '.join(wrong)}")
    text = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    for mark, content in (("families", table(families, "model_type")), ("gguf", table(files, "kind of file"))):
        start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
        text = re.sub(f"{start}.*{end}", lambda _, c=content, s=start, e=end: f"{s}\n{c}\n{e}", text, flags=re.S)
    FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
