"""Nodes of a harness learn from files, each from its own; how good each of them is before and after."""

from __future__ import annotations

import base64
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from meshnode.api.messages import LearningStatus
from meshnode.core.errors import ConfigError, NodeError
from meshnode.core.paths import Paths
from meshnode.harness.baselines import Baselines, Course, Judged, model_files
from meshnode.harness.hostile import ATTACKS
from meshnode.harness.member import HarnessError, Member, clean_environment
from meshnode.harness.mesh import Mesh, Plan
from meshnode.services.learning.book import ADAPTER
from meshnode.services.learning.worker import HIDDEN
from protocols.delta.frame import Frame, Vector, decode_frame

Say = Callable[[str], None]
Json = dict[str, Any]

IMPORT_S: Final = 120.0
LEARN_S: Final = 3600.0
BUSY_S: Final = 60.0  # for an answer while several trainers and engines share few cores
_LOOK_S: Final = 0.5
# A node of the harness trains whatever the machine does meanwhile.
SETTINGS: Final = (
    ("learn.enabled", True),
    ("learn.power", "any"),
    ("learn.battery", 0),
    ("learn.load", 100),
    ("learn.owner_idle", 0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What is tried.

    Attributes:
      trains: samples of each node, one file each.
      published: a model that the publisher wrote, with the variant `train`.
      hostile: so many of the last nodes attack.
      options: of the lesson (`meshnode learn start`).
      compared: of "alone" and "fedavg", what is measured, too.
      memory: serve.memory of each node; "0" serves no layers.
      servers: nodes after those that learn; they have no samples.
    """

    trains: Sequence[Path]
    heldout: Path
    published: Path
    variant: str = "int4"
    hostile: int = 0
    attack: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    compared: tuple[str, ...] = ("alone", "fedavg")
    memory: tuple[str, ...] = ("0",)
    settings: tuple[tuple[str, object], ...] = ()
    servers: int = 0

    def check(self) -> None:
        """Raises ConfigError."""
        if self.hostile and self.attack not in ATTACKS:
            raise ConfigError(f"--attack takes one of {', '.join(ATTACKS)}")
        if self.options.get("steps") == 0:
            raise ConfigError("--steps takes 1 or more here: what is compared trains as many everywhere")
        if not 0 <= self.hostile < len(self.trains):
            raise ConfigError(f"--hostile takes 0 to {len(self.trains) - 1}, fewer than there are nodes")


@dataclass(frozen=True, slots=True)
class Learned:
    """What the nodes of a mesh have come to."""

    frame: Frame
    statuses: tuple[LearningStatus, ...]
    vectors: tuple[Vector, ...]
    seconds: float


def learn(experiment: Experiment, folder: Path, say: Say) -> Json:
    """Make a mesh, have it learn, stop it, compare; what came of it. Blocking."""
    experiment.check()
    mesh = make(experiment, folder)
    try:
        mesh.up()
        learned = teach(mesh, experiment, say)
    finally:
        mesh.down()
    return compare(mesh, experiment, learned, folder, say)


def make(experiment: Experiment, folder: Path) -> Mesh:
    """The mesh of an experiment; nothing runs yet."""
    plan = Plan(
        nodes=len(experiment.trains) + experiment.servers,
        memory=experiment.memory,
        published=experiment.published,
        variant=experiment.variant,
        settings=(*SETTINGS, *experiment.settings),
    )
    mesh = Mesh.make(folder, plan)
    learners = mesh.serving[: len(experiment.trains)]
    for member in learners[len(learners) - experiment.hostile :]:
        member.program = ("meshnode.harness.hostile", experiment.attack)
    return mesh


def teach(mesh: Mesh, experiment: Experiment, say: Say) -> Learned:
    """Give a running mesh its samples and the lesson; wait until every node has done all rounds."""
    members = mesh.serving[: len(experiment.trains)]
    give_samples(members, experiment.trains)
    say(f"{len(members)} nodes run, each with samples of its own.")
    began = time.monotonic()
    # the first node has published the model: its word is there once it has read its own manifest
    members[0].wait_for(lambda status: status.model is not None, 60, "the model was announced")
    said = members[0].client.learn_start(experiment.heldout, least=len(members), **experiment.options)
    say(f"The lesson is given: {said['parameters']} parameters, {said['rounds']} rounds of {said['steps']} steps.")
    statuses = _watch(members, said["rounds"], say)
    seconds = time.monotonic() - began
    frame = decode_frame(base64.b64decode(said["frame_block"]))
    vectors = tuple(np.load(learned_folder(member, frame) / ADAPTER) for member in members)
    return Learned(frame, statuses, vectors, seconds)


def give_samples(members: Sequence[Member], trains: Sequence[Path]) -> None:
    """Import a file on each node, with the real command. Raises HarnessError."""
    command = [sys.executable, "-P", "-m", "meshnode", "data", "import"]
    running = [
        subprocess.Popen(
            [*command, str(path.absolute()), "--data", str(member.folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=clean_environment(),
        )
        for member, path in zip(members, trains, strict=True)
    ]
    failed = []
    for member, child in zip(members, running, strict=True):
        try:
            _, errors = child.communicate(timeout=IMPORT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            _, errors = child.communicate()
        if child.returncode != 0:
            failed.append(f"{member.name} took no samples: {errors.strip()}")
    if failed:
        raise HarnessError("; ".join(failed))


def _watch(members: Sequence[Member], rounds: int, say: Say) -> tuple[LearningStatus, ...]:
    """Until all rounds are done everywhere."""
    told, ends = -1, time.monotonic() + LEARN_S
    while True:
        statuses = tuple(member.client.status(timeout=BUSY_S).learning for member in members)
        if all(status.state == "done" for status in statuses):
            return statuses
        slowest = min(statuses, key=lambda status: (status.round, status.steps))
        if slowest.round > told and slowest.steps:
            told = slowest.round
            losses = [status.losses[-1] for status in statuses if status.losses]
            say(f"round {min(told, rounds)} of {rounds}; training loss {min(losses):.3f} to {max(losses):.3f}")
        if time.monotonic() > ends:
            raise HarnessError(f"the nodes have not learned within {LEARN_S:.0f} s: {slowest.state}, {slowest.why}")
        for member in members:
            if member.process() is None:
                raise NodeError("gone", f"{member.name} has stopped: {member.last_words()}")
        time.sleep(_LOOK_S)


def learned_folder(member: Member, frame: Frame) -> Path:
    """Where a node keeps what it learned in a lineage."""
    return Paths(member.folder).learned / frame.cid


def compare(mesh: Mesh, experiment: Experiment, learned: Learned, folder: Path, say: Say) -> Json:
    """How good every node is, and how good it would be otherwise. The mesh is stopped: its hidden states are free."""
    members = mesh.serving[: len(experiment.trains)]
    frame, options = learned.frame, experiment.options
    course = Course(
        frame=frame,
        model=model_files(experiment.published, frame.base),
        rounds=learned.statuses[0].rounds,
        steps=int(str(options.get("steps", 5))),
        batch=int(str(options.get("batch", 8))),
        rate=float(str(options.get("rate", 5e-3))),
    )
    honest = len(members) - experiment.hostile
    caches = [learned_folder(member, frame) / HIDDEN for member in members]
    baselines = Baselines(course, experiment.trains[:honest], folder / "baselines", caches)
    began = time.monotonic()
    alone: list[Vector] = []
    fedavg: list[Vector] = []
    if "alone" in experiment.compared:
        say("The same steps without a mesh: each node alone.")
        alone = baselines.alone()
    if "fedavg" in experiment.compared:
        say("The same steps without a mesh: FedAvg.")
        fedavg = [baselines.averaged()]
    say("Judging every adapter on the held-out samples.")
    vectors = learned.vectors[:honest]
    before, *judged = baselines.judge([None, *vectors, *alone, *fedavg], experiment.heldout)
    return {
        "nodes": [
            _line(member, status, before, judged[k], judged[honest + k] if alone else None)
            for k, (member, status) in enumerate(zip(members[:honest], learned.statuses, strict=False))
        ],
        "before": _plain(before),
        "fedavg": _plain(judged[-1]) if fedavg else None,
        "hostile": experiment.hostile,
        "attack": experiment.attack,
        "mode": learned.statuses[0].mode,
        "options": dict(options),
        "parameters": frame.parameters,
        "float32_bytes_a_delta": 4 * frame.parameters,
        "rounds": learned.statuses[0].rounds,
        "bytes_sent": sum(status.sent_bytes for status in learned.statuses),
        "seconds": round(learned.seconds, 1),
        "comparison_seconds": round(time.monotonic() - began, 1),
        "refused": dict(sum((Counter(status.refused) for status in learned.statuses[:honest]), Counter[str]())),
        "spread": float(max(np.abs(vector - vectors[0]).max() for vector in vectors)),
    }


def _line(member: Member, status: LearningStatus, before: Judged, after: Judged, alone: Judged | None) -> Json:
    return {
        "name": member.name,
        "before": _plain(before),
        "after": _plain(after),
        "alone": None if alone is None else _plain(alone),
        "rounds": status.rounds,
        "steps": status.steps,
        "train_seconds": status.train_s,
        "sent_bytes": status.sent_bytes,
        "fetched_bytes": status.fetched_bytes,
        "published": status.published,
        "mixed": status.mixed,
        "refused": status.refused,
        "refusals": list(status.refusals),
        "skipped": status.skipped,
        "losses": list(status.losses),
    }


def _plain(judged: Judged) -> Json:
    return {"accuracy": round(judged.accuracy, 4), "loss": round(judged.loss, 4)}


def table(result: Json) -> str:
    """For people."""
    lines = [f"{'':<10}{'before':>8}{'alone':>8}{'gossip':>8}{'FedAvg':>8}   loss  alone  gossip  FedAvg      sent"]
    fedavg = result["fedavg"]
    for node in result["nodes"]:
        cells = [node["before"], node["alone"], node["after"], fedavg]
        accuracies = "".join(f"{_percent(cell):>8}" for cell in cells)
        losses = "  ".join(f"{cell['loss']:6.3f}" if cell else "     -" for cell in cells)
        lines.append(f"{node['name']:<10}{accuracies} {losses}  {node['sent_bytes'] / 1e3:7.1f} kB")
    lines.append(
        f"{result['rounds']} rounds in {result['seconds']:.0f} s; "
        f"{sum(result['refused'].values())} deltas refused {result['refused'] or ''}"
    )
    return "\n".join(lines)


def _percent(cell: Json | None) -> str:
    return "-" if cell is None else f"{100 * cell['accuracy']:.1f} %"
