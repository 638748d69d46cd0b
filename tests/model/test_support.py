"""No family and no kind of GGUF file is accepted and wrong; docs/models.md says what is refused."""

from __future__ import annotations

import pytest

from tests.long import some
from tests.model.families import ARCHITECTURES, REFUSED, UNBUILT
from tests.model.gguf_cases import CASES, UNKNOWN_KEYS
from tests.model.support import COUNT, FILE, Row, family, gguf, gguf_with_unknown_key, table

pytestmark = [pytest.mark.model, pytest.mark.slow]


OFTEN = ("llama", "qwen2-yarn", "mixtral")


def look(row: Row, *, runs: bool) -> None:
    """A row is as it must be, and docs/models.md says so."""
    assert row.good, f"{row.name} is accepted, and {row.same} of {COUNT} tokens are right"
    assert (row.same is not None) is runs, row.words
    line = next(line for line in table([row], "").splitlines() if row.name in line)
    assert line in FILE.read_text(encoding="utf-8"), "docs/models.md says something else: run make models-table"


@pytest.mark.parametrize("name", some(ARCHITECTURES, "llama", "gemma2", "qwen2_moe"))
def test_a_family_answers_like_transformers(name: str) -> None:
    look(family(name), runs=True)


@pytest.mark.parametrize("name", [*REFUSED, *UNBUILT])
def test_a_family_is_refused_with_its_reason(name: str) -> None:
    look(family(name), runs=False)


@pytest.mark.parametrize("name", some((name for name, case in CASES.items() if case.kind == "F32"), *OFTEN))
def test_a_gguf_file_answers_like_transformers(name: str) -> None:
    look(gguf(name), runs=True)


@pytest.mark.parametrize("architecture", UNKNOWN_KEYS)
def test_a_gguf_file_is_refused_with_its_reason(architecture: str) -> None:
    look(gguf_with_unknown_key(architecture), runs=False)


def test_there_is_enough_of_both() -> None:
    assert len({name.partition("-")[0] for name in ARCHITECTURES}) >= 25
    assert len(CASES) >= 12
