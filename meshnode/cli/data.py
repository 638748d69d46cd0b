"""`meshnode data`: the samples that this device keeps to learn from. They stay on it, unless you export them."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, TextIO

from meshnode.cli.main import add_data
from meshnode.cli.settings import ask_passphrase, folder_of, settings
from meshnode.client import not_running
from meshnode.config.settings import Config
from meshnode.core.errors import ConfigError, DiskError
from meshnode.core.paths import Paths
from meshnode.core.printable import printable
from meshnode.core.sizes import format_size

if TYPE_CHECKING:
    from meshnode.state.sample_files import Kind, Line
    from meshnode.state.samples import Samples
    from meshnode.state.samples_port import Added, Sample, Summary, Window

BATCH: Final = 500  # samples of one transaction: the node is kept waiting for no longer
SHOWN: Final = 48  # characters of a text in the list
SPOOLED_BYTES: Final = 1 << 24  # of standard input, in memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    _add_json(parser)
    parser.set_defaults(action="list", limit=20, wrong=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    listed = actions.add_parser("list", help="what there is, newest first (the default)")
    listed.add_argument("--limit", type=int, default=20, metavar="N", help="how many are shown (default 20; 0: all)")
    listed.add_argument("--wrong", action="store_true", help="only those that were, or are, answered wrongly")
    taken = actions.add_parser("import", help='take samples: lines {"input": ..., "label": ...}, or CSV')
    taken.add_argument("file", type=Path, metavar="FILE", help="of any size up to 1 GiB; - for standard input")
    taken.add_argument("--again", action="store_true", help="also those that were forgotten once")
    given = actions.add_parser("export", help="write samples into a file, which everybody who has it can read")
    given.add_argument("file", type=Path, metavar="FILE", help="- for standard output")
    given.add_argument("--all", action="store_true", help="also answers of which nobody has said what is right")
    for action in (taken, given):
        action.add_argument("--format", choices=("jsonl", "csv"), help="default: csv for FILE.csv, else jsonl")
    forgotten = actions.add_parser("forget", help="remove samples for good, and tell what was trained on them")
    forgotten.add_argument(
        "samples", nargs="*", metavar="ID", help="as the list shows it; or a hash, or its beginning"
    )
    forgotten.add_argument("--all", action="store_true", help="everything")
    for action in actions.choices.values():  # before the action and behind it
        action.add_argument("--data", type=Path, metavar="FOLDER", default=argparse.SUPPRESS, help="of the node")
        _add_json(action, default=argparse.SUPPRESS)


def _add_json(parser: argparse.ArgumentParser, default: object = False) -> None:
    parser.add_argument("--json", action="store_true", default=default, help="as JSON (fields may be added)")


def run(arguments: argparse.Namespace) -> int:
    chosen = {"import": _import, "export": _export, "forget": _forget}.get(arguments.action, _list)
    with _opened(arguments) as (samples, config):
        return chosen(arguments, samples, config)


@contextmanager
def _opened(arguments: argparse.Namespace) -> Iterator[tuple[Samples, Config]]:
    """The samples of the data folder, whether or not its node runs; encrypted ones need the node's key."""
    from meshnode.membership.identity import Identity
    from meshnode.membership.network import load_network
    from meshnode.state.open_samples import open_samples
    from meshnode.state.sealing import samples_key

    folder, config = folder_of(arguments), settings(arguments)
    paths, learn = Paths(folder), config.learn
    if not Identity.exists(folder):
        raise not_running(folder)

    def key() -> bytes:
        return samples_key(Identity.load(folder, ask_passphrase).seed, load_network(folder).network_id)

    new = not paths.samples.exists()  # then it is as the node will want it; else as it is
    encrypt = config.content.encrypt if new else None
    with open_samples(paths.samples, learn.max_samples, learn.max_size, key, encrypt=encrypt) as samples:
        yield samples, config


# ---------------------------------------------------------------- list


def _list(arguments: argparse.Namespace, samples: Samples, config: Config) -> int:
    from meshnode.state.sample_files import sample_json

    if arguments.limit < 0:
        raise ConfigError("--limit takes 0 (all) or more")
    summary = samples.summary()
    shown = samples.newest(arguments.limit or None, wrong=arguments.wrong)
    spent = _privacy(config)
    if arguments.json:
        from dataclasses import asdict

        document = {"summary": asdict(summary), "privacy": spent, "samples": [sample_json(one) for one in shown]}
        print(json.dumps(document, indent=2, ensure_ascii=False))
        return 0
    print(_summed(summary, config))
    if spent is not None:
        limit = f" of {config.learn.epsilon:g}" if config.learn.epsilon else ""
        print(f"privacy: epsilon {spent['epsilon']:.3f}{limit} (delta {spent['delta']:g}) in {spent['steps']} steps")
    for number, sample in enumerate(shown):
        if not number:
            print(f"\n{'id':<8}{'when':<18}{'answer':<8}{'label':<20}input")
        print(_line(sample))
    return 0


def _summed(summary: Summary, config: Config) -> str:
    if not summary.samples:
        return "No samples. Import some (meshnode data import FILE), or judge answers (meshnode feedback ID wrong)."
    cover = "encrypted" if summary.encrypted else "not encrypted"
    return (
        f"{many(summary.samples, 'sample')}, {format_size(summary.size_bytes)}, {cover}: {summary.labelled} to learn "
        f"from, in {many(summary.classes, 'class')}, {summary.fresh} of them new; {many(summary.answers, 'answer')} "
        "that nobody has judged"
    )


def many(count: int, word: str) -> str:
    """ "1 sample", "2 samples"."""
    return f"{count} {word}" if count == 1 else f"{count} {word}{'es' if word.endswith('s') else 's'}"


def _privacy(config: Config) -> dict[str, float] | None:
    """What differentially private training has spent; None when there was none."""
    from meshnode.state.budget import SAMPLES, Budget

    if not config.paths.privacy.exists():
        return None
    with Budget(config.paths.privacy) as budget:
        spent = budget.spent(SAMPLES)
    return {"epsilon": spent.epsilon(config.learn.delta), "delta": config.learn.delta, "steps": spent.steps}


def _line(sample: Sample) -> str:
    from datetime import UTC, datetime

    when = datetime.fromtimestamp(sample.time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
    judged = {True: "right", False: "wrong", None: ""}[sample.correct]
    label, text = _short(sample.label, 18), _short(sample.input, SHOWN, end=True)
    return f"{sample.id:<8}{when:<18}{judged:<8}{label:<20}{text}".rstrip()


def _short(text: str, most: int, *, end: bool = False) -> str:
    """One line of it; `end`: its last characters, where prompts differ."""
    whole = printable(" ".join(text.split()))
    if len(whole) <= most:
        return whole
    return f"…{whole[1 - most :]}" if end else f"{whole[: most - 1]}…"


# ---------------------------------------------------------------- import


def _import(arguments: argparse.Namespace, samples: Samples, _config: Config) -> int:
    """The whole file is looked through before anything is taken, so that it can be corrected and imported again."""
    from dataclasses import asdict

    from meshnode.core.clock import wall_ms
    from meshnode.state.sample_files import read_samples
    from meshnode.state.samples_port import Added

    name, kind = _named(arguments), _kind(arguments)
    with ExitStack() as stack:
        file = _source(arguments.file, stack)
        total = file.seek(0, os.SEEK_END)
        file.seek(0)
        for _ in _followed(read_samples(file, name, kind), "look through", total):
            pass
        file.seek(0)
        lines = _followed(read_samples(file, name, kind), "import", total)
        done = Added()
        while batch := [line.sample for line in islice(lines, BATCH)]:
            done += samples.add(batch, "import", wall_ms(), again=arguments.again)
    print(json.dumps(asdict(done)) if arguments.json else _told(done, name, samples.summary()))
    return 0


def _followed(lines: Iterator[Line], step: str, total: int) -> Iterator[Line]:
    """With a progress line."""
    from meshnode.cli.model import StepProgress

    progress, shown = StepProgress(), -1
    for line in lines:
        if (share := 100 * line.end // max(1, total)) > shown:
            shown = share
            progress(step, "", min(line.end, total), total)
        yield line
    if shown < 100:
        progress(step, "", total, total)


def _told(done: Added, name: str, summary: Summary) -> str:
    classes = many(summary.classes, "class")
    lines = [f"{many(done.new, 'new sample')} from {name}; {summary.labelled} to learn from, in {classes}."]
    if done.known:
        lines.append(f"Here already: {done.known}.")
    if done.forgotten:
        lines.append(f"Forgotten once, and so left out: {done.forgotten}; --again takes them in.")
    if done.evicted:
        lines.append(
            f"Removed to make room: {done.evicted}; learn.max_samples and learn.max_size say how much is kept."
        )
    return "\n".join(lines)


def _source(path: Path, stack: ExitStack) -> BinaryIO:
    """A file that can be read twice. Raises ConfigError."""
    from meshnode.state.sample_files import MAX_FILE_BYTES

    try:
        if str(path) != "-":
            file: BinaryIO = stack.enter_context(path.open("rb"))
            if file.seekable():
                return file
        else:
            file = sys.stdin.buffer
        held: BinaryIO = tempfile.SpooledTemporaryFile(SPOOLED_BYTES)  # type: ignore[assignment] # noqa: SIM115
        stack.enter_context(held)
        while data := file.read(1 << 20):
            held.write(data)
            if held.tell() > MAX_FILE_BYTES:
                raise ConfigError(f"{path} gives more than {MAX_FILE_BYTES} bytes; import it in parts")
        return held
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from error


def _named(arguments: argparse.Namespace) -> str:
    return "standard input" if str(arguments.file) == "-" else str(arguments.file)


def _kind(arguments: argparse.Namespace) -> Kind:
    if arguments.format is not None:
        return "csv" if arguments.format == "csv" else "jsonl"
    return "csv" if arguments.file.suffix.lower() == ".csv" else "jsonl"


# ---------------------------------------------------------------- export


def _export(arguments: argparse.Namespace, samples: Samples, _config: Config) -> int:
    from meshnode.state.sample_files import write_samples

    kept = samples.newest(labelled=not arguments.all)
    if str(arguments.file) == "-":
        write_samples(kept, sys.stdout, _kind(arguments))
        return 0
    with _target(arguments.file) as file:
        count = write_samples(kept, file, _kind(arguments))
    if arguments.json:
        print(json.dumps({"samples": count, "file": str(arguments.file)}))
    else:
        print(f"{many(count, 'sample')} written to {arguments.file}, in the clear: who gets the file can read them.")
    return 0


@contextmanager
def _target(path: Path) -> Iterator[TextIO]:
    """A file for its owner alone, whole or as it was before. Raises DiskError."""
    half = path.with_name(path.name + ".part")
    try:
        descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with io.TextIOWrapper(io.FileIO(descriptor, "w"), encoding="utf-8", newline="") as file:
                yield file
            half.replace(path)
        except BaseException:
            half.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DiskError(f"{path} can't be written: {error.strerror or error}") from error


# ---------------------------------------------------------------- forget


def _forget(arguments: argparse.Namespace, samples: Samples, _config: Config) -> int:
    from dataclasses import asdict

    from meshnode.core.clock import wall_ms

    if arguments.all == bool(arguments.samples):
        raise ConfigError("name the samples to forget, as `meshnode data list` shows them, or --all")
    if arguments.all:
        wanted = samples.every()
    else:
        wanted = tuple(_only(samples, name) for name in dict.fromkeys(arguments.samples))
    done = samples.forget(wanted, wall_ms())
    if arguments.json:
        print(json.dumps(asdict(done)))
        return 0
    print(f"{many(done.samples, 'sample')} forgotten, and used no more.")
    for window in done.windows:
        print(_influence(window))
    if not done.windows:
        print("Nothing was trained on them.")
    return 0


def _only(samples: Samples, wanted: str) -> int:
    found = samples.find(wanted)
    if len(found) != 1:
        many = f"{len(found)} samples have a hash that begins with" if found else "there is no sample"
        raise ConfigError(f"{many} {wanted!r}; `meshnode data list` shows their ids, with --json their hashes")
    return found[0]


def _influence(window: Window) -> str:
    rounds = f"round {window.first}" if window.first == window.last else f"rounds {window.first} to {window.last}"
    return (
        f"They were trained on in {rounds} of the lineage {window.lineage}: what was learned from them is in its "
        "adapters since then, here and wherever those went. `meshnode release list` shows them; `meshnode release "
        "rollback` goes back to one from before."
    )
