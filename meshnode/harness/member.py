"""One node of a harness: a process, its data folder, its log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from meshnode.api.messages import Status
from meshnode.client import Client
from meshnode.core.errors import Declined, FatalError

START_S: Final = 120.0  # on a machine that is busy; a node that stops is noticed at once
STOP_S: Final = 20.0  # a node hands its layers over before it goes
ANSWER_S: Final = 600.0  # longest silence while an answer is computed
STATUS_S: Final = 5.0  # a node that takes longer hangs
_LOOK_S: Final = 0.02


class HarnessError(FatalError):
    """The harness, or a node in it, can't do what was asked."""

    exit_code = 9


@dataclass(slots=True)
class Member:
    """A node of the mesh.

    `pid` and `started` (seconds since 1970, as the system keeps it) name the process; both None when it does
    not run.
    """

    name: str
    folder: Path
    peer_id: str
    address: str
    serves: bool = True  # False: a bootstrap peer
    program: tuple[str, ...] = ()  # module and arguments that run the node; () is `meshnode start`
    pid: int | None = None
    started: float | None = None
    api_url: str = ""  # where it answered HTTP when it was last started

    @property
    def client(self) -> Client:
        """The library's door to it."""
        return Client(self.folder, timeout=ANSWER_S)

    @property
    def log(self) -> Path:
        return self.folder / "logs" / "node.log"

    def process(self) -> psutil.Process | None:
        """The running process; None when it has ended. A reused process id is not mistaken for ours."""
        if self.pid is None:
            return None
        try:
            process = psutil.Process(self.pid)
            if process.create_time() != self.started:
                return None
            # A killed process whose first thread has ended may still have others in the middle of an fsync.
            if process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1:
                return None
        except psutil.NoSuchProcess:
            return None
        return process

    def processes(self) -> list[psutil.Process]:
        """The node's process and its engine's."""
        process = self.process()
        if process is None:
            return []
        try:
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def launch(self) -> None:
        """Start the process; it outlives us. Raises HarnessError when it runs already."""
        if self.process() is not None:
            raise HarnessError(f"{self.name} runs already (process {self.pid})")
        command = [sys.executable, "-P", "-m", "meshnode", "start" if self.serves else "bootstrap"]
        if self.program:
            command[3:] = self.program
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                [*command, "--data", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=clean_environment(),
                start_new_session=True,  # Ctrl-C for us is not meant for it
            )
        self.pid = child.pid
        self.started = psutil.Process(child.pid).create_time()

    def wait_answers(self, seconds: float = START_S) -> None:
        """Until the node listens on its control socket. Raises HarnessError with its last words."""
        ends = time.monotonic() + seconds
        while not self.client.is_running():
            if self.process() is None:
                raise HarnessError(f"{self.name} stopped at once: {self.last_words()}")
            if time.monotonic() > ends:
                raise HarnessError(f"{self.name} did not answer within {seconds:.0f} s: {self.last_words()}")
            time.sleep(_LOOK_S)
        self.api_url = self.status().api_url

    def wait_ready(self, seconds: float) -> None:
        """Until a probe token of this node has passed through the chain. Raises HarnessError with the reason."""
        try:
            self.client.wait_ready(seconds)
        except Declined as error:
            raise HarnessError(f"{self.name}: {error}") from error

    def status(self) -> Status:
        """What `meshnode status` shows."""
        return self.client.status(timeout=STATUS_S)

    def wait_for(self, wanted: Callable[[Status], bool], seconds: float, what: str) -> Status:
        """Until the node's status is as `wanted`; gives that status.

        Raises HarnessError after `seconds`, with `what` was waited for. NotRunning, NodeError: it went away.
        """
        ends = time.monotonic() + seconds
        while not wanted(status := self.status()):
            if time.monotonic() > ends:
                raise HarnessError(f"{self.name}: {what} did not happen within {seconds:.0f} s: {self.last_words()}")
            time.sleep(_LOOK_S)
        return status

    def stop(self) -> None:
        """Ask it to leave in good order; kill it when it does not. Nothing happens when it does not run."""
        process = self.process()
        if process is None:
            return
        self.signal(signal.SIGCONT)
        with suppress(psutil.NoSuchProcess):
            process.terminate()

    def wait_stopped(self, seconds: float = STOP_S) -> None:
        """Until the process has ended; it is killed after `seconds`."""
        process = self.process()
        if process is not None:
            try:
                process.wait(seconds)
            except psutil.TimeoutExpired:
                self.signal(signal.SIGKILL)
                with suppress(psutil.TimeoutExpired):
                    process.wait(5)
        self.pid = self.started = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the node and its engine. Raises HarnessError when it does not run."""
        processes = self.processes()
        if not processes:
            raise HarnessError(f"{self.name} does not run")
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def last_words(self) -> str:
        """The end of its log."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "it wrote no log"


def clean_environment() -> Mapping[str, str]:
    """Ours without settings of meshnode: a node of the harness is set by its own config.toml alone."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MESHNODE_")}
