"""Where a node keeps its files. Everything lies in one data folder, readable by its owner alone."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshnode.core.errors import ConfigError, DiskError

DATA_VARIABLE: Final = "MESHNODE_DATA"
MAX_SOCKET_BYTES: Final = 107  # sun_path of Linux without its closing zero; macOS has 103
_SAFE_SOCKET_BYTES: Final = 100
PUBLISH_PREFIX: Final = "publish-"  # of folders in the cache with the files of a model that is being published


def data_folder(flag: str | Path | None, environ: Mapping[str, str]) -> Path:
    """The data folder, absolute: `--data`, MESHNODE_DATA, $XDG_DATA_HOME/meshnode, or ~/.local/share/meshnode."""
    if flag:
        return Path(flag).expanduser().absolute()
    if environ.get(DATA_VARIABLE):
        return Path(environ[DATA_VARIABLE]).expanduser().absolute()
    base = environ.get("XDG_DATA_HOME", "")
    if base.startswith("/"):  # the XDG specification says to ignore relative paths
        return Path(base) / "meshnode"
    home = environ.get("HOME", "")
    if not home:
        raise ConfigError(f"HOME is not set; say where the node keeps its files with --data or {DATA_VARIABLE}")
    return Path(home) / ".local" / "share" / "meshnode"


@dataclass(frozen=True, slots=True)
class Paths:
    """The layout of one data folder."""

    folder: Path

    @property
    def config(self) -> Path:
        """What the owner sets (TOML)."""
        return self.folder / "config.toml"

    @property
    def key(self) -> Path:
        """The node's Ed25519 key, mode 0600."""
        return self.folder / "node.key"

    @property
    def network(self) -> Path:
        """Membership: network description, our certificate, invites we gave out."""
        return self.folder / "network"

    @property
    def state(self) -> Path:
        """Small durable records (SQLite)."""
        return self.folder / "state.sqlite"

    @property
    def samples(self) -> Path:
        """What this device keeps to learn from (SQLite)."""
        return self.folder / "samples.sqlite"

    @property
    def privacy(self) -> Path:
        """What differentially private training has spent (SQLite)."""
        return self.folder / "privacy.sqlite"

    @property
    def learned(self) -> Path:
        """What this device learned, a folder for each lineage, and what the trainer keeps."""
        return self.folder / "learned"

    @property
    def content(self) -> Path:
        """Content-addressed files and their index."""
        return self.folder / "content"

    @property
    def cache(self) -> Path:
        """What can be made again at any time: stage graphs that were cut."""
        return self.folder / "cache"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def lock(self) -> Path:
        """Locked while a node runs on this folder."""
        return self.folder / "node.lock"

    @property
    def control_socket(self) -> Path:
        """The unix socket of a running node.

        It lies in the data folder if its path fits into a socket address, else in a short folder of the
        user's own under $XDG_RUNTIME_DIR or the temporary directory, named by a hash of the data folder.
        """
        inside = self.folder / "control.sock"
        if len(os.fsencode(inside)) <= _SAFE_SOCKET_BYTES:
            return inside
        digest = hashlib.sha256(os.fsencode(self.folder.absolute())).hexdigest()[:16]
        runtime = Path(f"/run/user/{os.getuid()}")
        base = runtime if os.access(runtime, os.W_OK) else Path(tempfile.gettempdir())
        if len(os.fsencode(base)) > 60:
            base = Path("/tmp")
        return base / f"meshnode-{os.getuid()}" / f"{digest}.sock"

    def create(self) -> None:
        """Make the folders, mode 0700.

        Raises DiskError when they can't be made, or when somebody else owns the control socket's folder.
        """
        try:
            for folder in (self.folder, self.network, self.content, self.cache, self.logs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            socket_folder = self.control_socket.parent
            if socket_folder != self.folder:
                socket_folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise DiskError(
                f"The data folder {self.folder} can't be used: {error.strerror or error} ({error.filename}). "
                f"Choose another with --data or {DATA_VARIABLE}."
            ) from error
        self.check_socket_folder()

    def check_socket_folder(self) -> None:
        """Raise DiskError when the control socket's folder is there, and somebody else could have made it.

        The data folder is the user's own choice; the other one is in a place where all may write.
        """
        folder = self.control_socket.parent
        if folder == self.folder:
            return
        try:
            status = folder.lstat()
        except OSError:
            return
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise DiskError(
                f"{folder}, where the control socket lies, is not a folder that only you can use: somebody else may "
                f"listen there. Remove it, or choose a data folder with a shorter path than {self.folder}."
            )
