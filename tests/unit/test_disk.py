"""What the content folder asks of the disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from meshnode.store.os_files import available_bytes, locked, remove_abandoned


def test_what_is_available_does_not_shrink_by_what_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota that is a share of it would be smaller at every start, and cost spare copies."""
    disk = 1 << 40
    (tmp_path / "files").mkdir()

    def usage(folder: Path) -> SimpleNamespace:
        held = sum(path.stat().st_blocks * 512 for path in (folder / "files").iterdir())
        return SimpleNamespace(free=disk - held)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert available_bytes(tmp_path) == disk
    (tmp_path / "files" / "model").write_bytes(b"x" * 5_000_000)
    assert usage(tmp_path).free < disk
    assert available_bytes(tmp_path) == disk


def test_what_a_killed_publisher_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left, used, other = (tmp_path / name for name in ("publish-1", "publish-2", "other"))
    for folder in (left, used, other):
        folder.mkdir()
        (folder / "weights").write_bytes(b"readable")
    with locked(used):
        remove_abandoned(tmp_path, "publish-")
        assert not left.exists()
        assert used.exists() and other.exists()
    remove_abandoned(tmp_path, "publish-")
    assert not used.exists() and other.exists()
