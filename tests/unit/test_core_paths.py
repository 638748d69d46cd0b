from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from meshnode.core.errors import ConfigError, DiskError
from meshnode.core.paths import MAX_SOCKET_BYTES, Paths, data_folder


def test_where_the_data_folder_comes_from() -> None:
    environ = {"HOME": "/h", "XDG_DATA_HOME": "/x", "MESHNODE_DATA": "/m"}
    assert data_folder("/flag", environ) == Path("/flag")
    assert data_folder(None, environ) == Path("/m")
    assert data_folder(None, {"HOME": "/h", "XDG_DATA_HOME": "/x"}) == Path("/x/meshnode")
    assert data_folder(None, {"HOME": "/h", "XDG_DATA_HOME": "relative"}) == Path("/h/.local/share/meshnode")
    assert data_folder("here", {}).is_absolute()
    with pytest.raises(ConfigError, match="--data"):
        data_folder(None, {})


def test_folders_are_the_owners_alone(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "a" / "b")
    paths.create()
    paths.create()
    for folder in (paths.folder, paths.network, paths.content, paths.cache, paths.logs):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"file/data can't be used.*--data"):
        Paths(tmp_path / "file" / "data").create()


def test_a_short_folder_holds_its_own_socket() -> None:
    assert Paths(Path("/srv/mesh")).control_socket == Path("/srv/mesh/control.sock")


def test_a_long_folder_gets_a_short_socket_that_can_be_bound(tmp_path: Path) -> None:
    paths = Paths(tmp_path / ("long" * 30))
    other = Paths(tmp_path / ("long" * 30 + "er"))
    paths.create()
    where = paths.control_socket
    assert where == Paths(paths.folder).control_socket != other.control_socket
    assert len(os.fsencode(where)) <= MAX_SOCKET_BYTES
    assert stat.S_IMODE(where.parent.stat().st_mode) == 0o700
    where.unlink(missing_ok=True)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(where))
    finally:
        where.unlink(missing_ok=True)


def test_a_socket_folder_open_to_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    monkeypatch.setattr(Paths, "control_socket", property(lambda self: shared / "x.sock"))
    with pytest.raises(DiskError, match="not a folder that only you can use"):
        Paths(tmp_path / "data").create()
