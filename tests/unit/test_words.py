"""Sizes, counts and layers, read aloud."""

from __future__ import annotations

import pytest

from meshnode.core.printable import one_line
from meshnode.core.sizes import counted
from protocols.words import layers


def test_one_is_not_several() -> None:
    assert [counted(n, "ticket") for n in (0, 1, 2)] == ["0 tickets", "1 ticket", "2 tickets"]
    assert [counted(n, "file is", "files are") for n in (1, 3)] == ["1 file is", "3 files are"]


@pytest.mark.parametrize(("span", "words"), [((16, 17), "layer 16"), ((0, 2), "layers 0 to 1"), ((0, 1), "layer 0")])
def test_one_layer_has_no_end(span: tuple[int, int], words: str) -> None:
    assert layers(*span) == words


def test_one_line_steers_no_terminal() -> None:
    assert one_line(" a\tb\r\n  c\x1b[2J ") == "a b c\\x1b[2J"
