"""Two tasks, four nodes with private samples each: they learn, vote, roll out; a fifth that never trained serves it.

Task (a): what a request wants, two of seven intents on each node. Task (b): what a line of a machine's log means,
with words that only one site uses. The fifth node holds the int4 layers and answers questions, before and after.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from meshnode.core.errors import DiskError
from meshnode.harness.learn import Experiment, Say, compare, make, table, teach
from meshnode.harness.member import HarnessError, Member
from meshnode.harness.tasks import Task, fetch_intents, intents, logs, read_examples

Json = dict[str, Any]

ASKED: Final = 40  # held-out questions that the fifth node answers
SERVER_MEMORY: Final = "800MB"
RELEASED_S: Final = 600.0
_LOOK_S: Final = 0.5
# A demonstration does not wait a quarter of an hour between the steps of a roll-out.
PACE: Final = (("release.collect", 5), ("release.soak", 5), ("learn.keep_answers", False))


@dataclass(frozen=True, slots=True)
class Lesson:
    """A task, and how it is learned."""

    name: str
    title: str
    make: Callable[[Path], Task]  # given a folder for downloads
    options: Mapping[str, object]


LESSONS: Final = (
    Lesson(
        "intents",
        "(a) what a request wants: two of seven intents on each node",
        lambda cache: intents(fetch_intents(cache), per_node=200, heldout=210),
        {"rounds": 12, "steps": 5, "rate": 5e-3, "gate": 32, "seed": 1},
    ),
    Lesson(
        "logs",
        "(b) what a log line means: each site has words of its own",
        lambda _cache: logs(per_site=200, heldout=210),
        {"rounds": 16, "steps": 6, "rate": 2e-3, "gate": 32, "seed": 1, "targets": "all"},
    ),
)


def demo(published: Path, folder: Path, cache: Path, say: Say, lessons: Sequence[Lesson] = LESSONS) -> list[Json]:
    """Run the tasks, one after the other; what came of each. Blocking."""
    return [_one(lesson, published, folder / lesson.name, cache, say) for lesson in lessons]


def _one(lesson: Lesson, published: Path, folder: Path, cache: Path, say: Say) -> Json:
    say(f"Task {lesson.title}.")
    trains, heldout = lesson.make(cache).write(folder / "files")
    experiment = Experiment(
        trains=trains,
        heldout=heldout,
        published=published,
        options=lesson.options,
        memory=("0", "0", "0", "0", SERVER_MEMORY),
        settings=PACE,
        servers=1,
        compared=("alone",),
    )
    mesh = make(experiment, folder / "mesh")
    try:
        mesh.up()
        server = mesh.serving[-1]
        server.wait_ready(300)
        before = answered(server, heldout)
        say(f"{server.name} serves the model in int4 and names the right answer {before} times of {ASKED}.")
        learned = teach(mesh, experiment, say)
        began = time.monotonic()
        release = _released(server)
        say(f"{release['version']} is released: {release['votes']} votes, loss changed by {release['median']:+.3f}.")
        after = answered(server, heldout)
        say(f"{server.name}, which never trained, now names the right answer {after} times of {ASKED}.")
        release_s = time.monotonic() - began
    finally:
        mesh.down()
    result = compare(mesh, experiment, learned, folder, say)
    say(f"What became of it:\n{table(result)}")
    return {
        **result,
        "task": lesson.name,
        "title": lesson.title,
        "served": {"asked": ASKED, "before": before, "after": after},
        "release": release,
        "release_seconds": round(release_s, 1),
    }


def answered(server: Member, heldout: Path) -> int:
    """How many of the first held-out questions a node answers with the right label, and nothing else at first."""
    right = 0
    for input_, label in read_examples(heldout)[:ASKED]:
        answer = server.client.generate(input_, max_tokens=4, temperature=0, raw=True)
        right += answer.text.strip().lower().startswith(label)
    return right


def _released(server: Member) -> Json:
    """Wait until a node's questions are answered with what was learned. Raises HarnessError."""
    ends = time.monotonic() + RELEASED_S
    while True:
        for release in server.client.releases():
            if release.in_use:
                return {"version": release.version, "votes": release.votes, "median": release.median or 0.0}
        if time.monotonic() > ends:
            known = "; ".join(f"{one.version} {one.phase}: {one.why}" for one in server.client.releases()) or "none"
            raise HarnessError(f"what was learned is not released within {RELEASED_S:.0f} s; {known}")
        time.sleep(_LOOK_S)


def draw(results: Sequence[Json], out: Path) -> list[Path]:
    """The curves as PNG and SVG; the files. Raises DiskError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results), 2, figsize=(11, 4.2 * len(results)), squeeze=False)
    for (left, right), result in zip(axes, results, strict=True):
        for node in result["nodes"]:
            left.plot(range(1, len(node["losses"]) + 1), node["losses"], label=node["name"], linewidth=1)
        left.set(title=result["title"], xlabel="step", ylabel="training loss", yscale="log")
        left.legend()
        names = [node["name"] for node in result["nodes"]]
        bars = {"before": "before", "alone": "alone", "after": "together"}
        for place, (key, words) in enumerate(bars.items()):
            values = [100 * node[key]["accuracy"] if node[key] else 0.0 for node in result["nodes"]]
            right.bar([k + 0.27 * (place - 1) for k in range(len(names))], values, 0.25, label=words)
        right.set(title="held-out accuracy, %", ylim=(0, 115), xticks=range(len(names)), xticklabels=names)
        right.legend(loc="upper center", ncol=3)
    figure.tight_layout()
    paths = [out / f"learn.{kind}" for kind in ("png", "svg")]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in paths:
            figure.savefig(path)
    except OSError as error:
        raise DiskError(f"the curves can't be written to {out}: {error.strerror or error}") from error
    finally:
        pyplot.close(figure)
    return paths
