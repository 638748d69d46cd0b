"""The state port's conformance suite on a file and in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from meshnode.state.database import Database
from meshnode.state.memory_state import MemoryState
from meshnode.state.port import State
from tests.conformance.check_state import CHECKS, Check


def in_a_file(folder: Path, stack: ExitStack) -> Callable[[], State]:
    return lambda: stack.enter_context(Database(folder / "state.sqlite"))


def in_memory(_folder: Path, _stack: ExitStack) -> Callable[[], State]:
    state = MemoryState()
    return lambda: state


@pytest.mark.parametrize("kind", [in_a_file, in_memory])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_state(check: Check, kind: Callable[[Path, ExitStack], Callable[[], State]], tmp_path: Path) -> None:
    with ExitStack() as stack:
        check(kind(tmp_path, stack))
