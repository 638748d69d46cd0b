"""ARCHITECTURE.md names files that exist, and says where at least 25 behaviours are changed."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "ARCHITECTURE.md").read_text()


def test_to_change_x_open_y() -> None:
    table = TEXT.partition("## To change X, open Y")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines() if row.startswith("|")][2:]
    assert len(rows) >= 25
    for _, files in rows:
        names = re.findall(r"`([^`]+)`", files)
        assert names
        assert all((ROOT / name).exists() for name in names), files


def test_every_folder_has_its_line() -> None:
    table = TEXT.partition("| folder |")[2].partition("\n## ")[0]
    for path in (ROOT / "meshnode").glob("*/__init__.py"):
        assert f"{path.parent.name}/`" in table, path.parent.name


def test_files_that_the_text_names_exist() -> None:
    """Named by their place in meshnode/, in protocols/ or in services/."""
    places = ("", "meshnode", "protocols", "meshnode/services", "meshnode/services/inference", "meshnode/net")
    for name in set(re.findall(r"`([\w/]+\.py)`", TEXT)):
        assert any((ROOT / place / name).exists() for place in places), name
