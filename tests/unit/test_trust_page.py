"""docs/trust.md: every line names a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NAMED = sorted(set(re.findall(r"`(tests/[^`:]+)::([^`]+)`", (ROOT / "docs" / "trust.md").read_text())))


@pytest.mark.parametrize(("file", "test"), NAMED, ids=[test for _, test in NAMED])
def test_the_test_of_a_line_exists(file: str, test: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert test in names


def test_there_are_many() -> None:
    assert len(NAMED) > 30
