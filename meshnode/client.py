"""Talk to the node that runs on this device: blocking, standard library only, so that programs start fast.

with meshnode.connect() as node:
    print(node.generate("Why is the sky blue?").text)
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, Unpack

from meshnode.api.messages import (
    Answer,
    DutyStatus,
    Embedding,
    Json,
    Judgement,
    Piece,
    ReleaseStatus,
    RolledBack,
    Status,
    read,
    read_error,
)
from meshnode.core.errors import BadRequest, Declined, NodeError, NotRunning
from meshnode.core.listener_owner import check_listener
from meshnode.core.paths import Paths, data_folder
from meshnode.text.question import Options, Prompt, Question, question

SECONDS: Final = 10.0  # for an answer that a node has at hand
GRACE_S: Final = 10.0  # beside the time that a command itself takes
QUIET_S: Final = 15.0  # after this silence a node is asked whether it still lives
READ_BYTES: Final = 1 << 16
FETCH_S: Final = 120.0  # a node says within this time that a fetch goes on, or why it does not


def connect(data: str | os.PathLike[str] | None = None, *, timeout: float | None = None) -> Client:
    """The node that runs on this device; use it in `with`.

    Args:
      data: its data folder; None: $MESHNODE_DATA, else the one in your home, as the command line finds it.
      timeout: longest silence in seconds while an answer comes; None waits as long as the node lives.

    Raises NotRunning, with what to do.
    """
    client = Client(data_folder(None if data is None else Path(data), os.environ), timeout=timeout)
    client.check()
    return client


class Stream(Iterator[Piece]):
    """An answer as it comes: iterate over its pieces. Closing it early cancels the generation on every stage.

    `answer`: the whole answer with its receipt, once the last piece has come; None before.
    """

    def __init__(self, answers: Iterator[Json], waiting: Callable[[str], None]) -> None:
        self.answer: Answer | None = None
        self._answers = answers
        self._waiting = waiting

    def __next__(self) -> Piece:
        for answer in self._answers:
            if "waiting" in answer:
                self._waiting(answer["waiting"])
            elif "done" in answer:
                self.answer = Answer.read(answer["done"])
            else:
                return Piece.read(answer)
        raise StopIteration

    def whole(self) -> Answer:
        """The rest of it. Raises what iterating raises."""
        for _ in self:
            pass
        if self.answer is None:
            raise NodeError("gone", "the stream was closed before its answer was complete")
        return self.answer

    def close(self) -> None:
        """Stop the generation, unless it is over. Nothing else is affected."""
        self._answers.close()  # type: ignore[attr-defined] # a generator

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """One node. Each call has a connection of its own: a client may be used by several threads."""

    def __init__(self, folder: Path, *, timeout: float | None = None) -> None:
        """`folder`: the node's data folder; `timeout`: see `connect`. Nothing is opened."""
        self.folder = folder
        self._timeout = timeout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    # ------------------------------------------------------------ asking

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """The whole answer to a text, to chat messages ({"role", "content"}), or to token ids.

        Raises:
          BadRequest: the question can't be asked like this. Declined: the mesh says no, with a code.
          PeerUnreachable: a node was lost on the way. NotRunning. NodeError.
        """
        return self.ask(question(prompt, options)).whole()

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """The answer piece by piece. Raises as `generate`, most of it only when the first piece is asked for."""
        return self.ask(question(prompt, options))

    def ask(self, question: Question, *, waiting: Callable[[str], None] = lambda why: None) -> Stream:
        """The answer to a question that was read already.

        waiting: called with the reason when the mesh is not ready yet and the node waits for it.
        """
        return Stream(self.request("generate", self._timeout, **question.as_json()), waiting)

    def embed(self, text: str | Sequence[int], *, adapter: str | None = None) -> Embedding:
        """A text, or token ids, as one vector: the mean of its tokens' hidden states after the last layer.

        adapter: as in `Options`.

        Raises as `generate`; Declined `no-pooling` when the served model gives no vectors.
        """
        asked = text if isinstance(text, str) else list(text)
        return Embedding.read(self._done("embed", self._timeout, input=asked, adapter=adapter))

    def feedback(self, answer: Answer | str, correct: bool, *, label: str = "") -> Judgement:
        """Say whether an answer of this node was right, so that it can learn from that. The last word counts.

        Args:
          answer: what `generate` gave, or its id.
          label: what would have been right; without one, a wrong answer is counted and nothing is learned from it.

        Raises BadRequest: the answer is not kept (any more), or the label can't be one.
        """
        return Judgement.read(self._done("feedback", SECONDS, **judgement(answer, correct, label)))

    # ------------------------------------------------------------ the node

    def check(self) -> None:
        """Raises NotRunning, with what to do, when nobody listens."""
        _connect(self.folder, SECONDS).close()

    def is_running(self) -> bool:
        """Whether a node listens."""
        try:
            self.check()
        except NotRunning:
            return False
        return True

    def status(self, *, timeout: float = SECONDS) -> Status:
        """Everything that `meshnode status` shows. Raises NotRunning, NodeError."""
        return Status.read(self._done("status", timeout))

    def wait_ready(self, seconds: float = 60.0) -> None:
        """Until a token has passed through the whole chain of layers. Raises Declined `not-ready` with the reason."""
        answer = self._done("ready", seconds + GRACE_S, seconds=seconds)
        if not answer["ready"]:
            raise Declined("not-ready", f"the mesh is not ready after {seconds:g} s: {answer['readiness']}")

    def serve(self, model: str, *, variant: str | None = None) -> None:
        """Have the network serve a model that this node knows: its name, name@version, or the CID of its manifest.

        variant: its precision, such as int4; None: the one in which the node knows it.

        Raises ModelError, with what there is.
        """
        self._done("serve", SECONDS, model=model, variant=variant)

    def retract(self) -> None:
        """Take back this node's word about which model the network serves: that of others counts again."""
        self._done("retract", SECONDS)

    def fetch_manifest(self, manifest: str) -> None:
        """Have the manifest of a model, by its CID, in the node's store. Raises ContentUnavailable."""
        self._done("fetch-manifest", FETCH_S, manifest=manifest)

    def pin(
        self, manifest: str, variant: str, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> int:
        """Have every file of one variant on this node, and keep it; its bytes.

        progress: called with the bytes that are here, and with all.
        """
        for answer in self.request("pin", FETCH_S, manifest=manifest, variant=variant):
            if "done" in answer:
                return int(answer["done"]["bytes"])
            progress(answer["fetched"], answer["total"])
        raise gone(self.folder)

    def releases(self) -> tuple[ReleaseStatus, ...]:
        """Adapters that are proposed, rolled out, released or revoked, the newest first."""
        return tuple(ReleaseStatus.read(one) for one in self._done("releases", SECONDS))

    def propose(self, adapter: str) -> ReleaseStatus:
        """Propose an adapter, by the CID of its manifest, in place of what is released.

        Raises Declined, with the role or the release that is missing; ContentUnavailable.
        """
        return ReleaseStatus.read(self._done("propose", FETCH_S, adapter=adapter))

    def roll_back(self, release: str = "", *, why: str = "") -> RolledBack:
        """Go back from an adapter, by its version or CID; empty: the one in use. This node's vote is told to all.

        A founder's device ends its use everywhere; other voters do so together, when they are a third.
        Raises Declined `no-release`.
        """
        return RolledBack.read(self._done("roll-back", SECONDS, release=release, why=why))

    def learn_start(self, suite: str | os.PathLike[str], **options: object) -> Json:
        """Have the network learn, judged on the samples of a file; what the lesson says.

        Args:
          suite: a file of lines {"input": ..., "label": ...}, which all nodes that learn will fetch. Hold it back
            from what they train on.
          options: as in `meshnode learn start --help`, with underscores.

        Raises BadRequest, ModelError, DiskError; Declined `forbidden` without the role `publish`.
        """
        answer: Json = self._done("learn-start", FETCH_S, suite=absolute(suite), **options)
        return answer

    def pair(self, roles: Sequence[str] = ()) -> Iterator[Json]:
        """Let in one device by a PIN: `pin`, `addresses`, `seconds` and `roles`, then `done`: who got the ticket.

        Closing the iterator closes pairing. Raises Declined `pairing-closed` (nobody came, or with wrong PINs),
        IdentityError (this node may not invite), NotRunning.
        """
        return self.request("pair", None, roles=list(roles))

    def learn_stop(self) -> None:
        """Take back the lesson that this node has given. What was learned stays."""
        self._done("learn-stop", SECONDS)

    def members_changed(self) -> None:
        """Tell the node that the state file has news about members: it acts on them, and tells everybody, now."""
        self._done("members-changed", SECONDS)

    def pause(self, seconds: float = 0.0) -> DutyStatus:
        """Have the node do nothing in the background (no learning, no copies, nothing published); it goes on serving.

        seconds: for how long; 0: until `resume`. It outlives a restart.
        """
        return self._order("pause", seconds)

    def drain(self, seconds: float = 0.0) -> DutyStatus:
        """The same, and give its layers away: others take them over first, running sessions end by themselves."""
        return self._order("drain", seconds)

    def resume(self) -> DutyStatus:
        """Undo `pause` and `drain`; what holds then, which may still be less than all if the settings say so."""
        return self._order("resume", 0.0)

    def _order(self, name: str, seconds: float) -> DutyStatus:
        return read(DutyStatus, self._done(name, SECONDS, seconds=seconds))

    def stop(self) -> None:
        """Have the node hand over its layers and stop. Returns as soon as it has begun to."""
        self._done("stop", SECONDS)

    # ------------------------------------------------------------ the socket

    def _done(self, name: str, timeout: float | None, **fields: Any) -> Any:
        for answer in self.request(name, timeout, **fields):
            if "done" in answer:
                return answer["done"]
        raise gone(self.folder)

    def request(self, name: str, timeout: float | None, **fields: Any) -> Iterator[Json]:
        """Send a command as the control socket takes it (meshnode/api/control.py); its answers one by one.

        timeout: longest silence before an answer, in seconds; None waits as long as the node lives.

        Raises NotRunning, NodeError, or what the node answers with.
        """
        with _connect(self.folder, QUIET_S if timeout is None else timeout) as connection:
            with suppress(ConnectionError):  # it refused and hung up: its answer says why
                connection.sendall(request_line(name, fields))
            for line in self._lines(connection, timeout):
                answer = read_line(line)
                yield answer
                if "done" in answer:
                    return
        raise gone(self.folder)

    def _lines(self, connection: socket.socket, timeout: float | None) -> Iterator[bytes]:
        """What the node says, until it hangs up. Without a limit, a silent node is asked whether it still lives."""
        pieces: list[bytes] = []
        while True:
            try:
                data = connection.recv(READ_BYTES)
            except TimeoutError:
                if timeout is not None:
                    raise not_within(self.folder, timeout) from None
                self.status(timeout=SECONDS)  # raises when it hangs
                continue
            except ConnectionError:
                return
            if not data:
                return
            *whole, rest = data.split(b"\n")
            for line in whole:
                yield b"".join((*pieces, line))
                pieces.clear()
            pieces.append(rest)


def absolute(path: str | os.PathLike[str]) -> str:
    """A path that means the same to the node, which runs in another folder."""
    return str(Path(path).absolute())


def judgement(answer: Answer | str, correct: bool, label: str) -> Json:
    """The fields of the command `feedback`. Raises BadRequest."""
    given = answer.id if isinstance(answer, Answer) else answer
    if not given:
        raise BadRequest(
            "this answer can't be judged, because the node did not keep it: it was asked in token ids, was empty or "
            "too long, or answers are not kept there (learn.keep_answers)"
        )
    return {"answer": given, "correct": correct, "label": label}


def request_line(name: str, fields: Mapping[str, Any]) -> bytes:
    """A command for the control socket."""
    return json.dumps({"do": name, **fields}).encode() + b"\n"


def read_line(line: bytes) -> Json:
    """One answer. Raises the error that it is."""
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise NodeError("gone", "the node broke off in the middle of an answer")
    if "error" in answer:
        raise read_error(answer["error"])
    return answer


def not_running(folder: Path) -> NotRunning:
    """The sentence, with what to do."""
    if not any(Paths(folder).network.glob("*")):
        return NotRunning(
            f"There is no node in {folder} yet. Make a network with `meshnode init`, or enter one with "
            "`meshnode join TICKET`; --data names another folder."
        )
    return NotRunning(f"No node runs in {folder}. Start it with: meshnode start --data {folder}")


def gone(folder: Path) -> NodeError:
    """The node went away."""
    return NodeError("gone", f"the node in {folder} stopped while it was answering")


def not_within(folder: Path, seconds: float | None) -> NodeError:
    """The node said nothing for too long."""
    return NodeError("timeout", f"the node in {folder} did not answer within {seconds:g} s")


def _connect(folder: Path, timeout: float | None) -> socket.socket:
    paths = Paths(folder)
    paths.check_socket_folder()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        connection.connect(str(paths.control_socket))
    except OSError:
        connection.close()
        raise not_running(folder) from None
    try:
        check_listener(connection, paths)
    except BaseException:
        connection.close()
        raise
    return connection
