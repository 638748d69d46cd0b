"""The samples that a device keeps to learn from: one SQLite file, encrypted if the owner wants it. They stay in it.

Texts lie in `body`; what is beside them tells nobody who lacks the key of the file what they are: samples and classes
are known by keyed hashes. Deleted rows are overwritten.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from meshnode.core.errors import BadRequest, DiskError
from meshnode.policy.randomness import Randomness
from meshnode.policy.selection import Candidate, choose
from meshnode.state.samples_port import (
    MAX_ANSWERS,
    MAX_FORGOTTEN,
    MAX_SAMPLE_BYTES,
    Added,
    Forgotten,
    Limits,
    NewSample,
    Result,
    Sample,
    Source,
    Summary,
    Window,
    check_sample,
    text_bytes,
)
from meshnode.state.sealing import KEY_BYTES, seal, unseal
from meshnode.state.sqlite_file import SqliteFile

MIGRATIONS: Final = (
    """
    CREATE TABLE file (one INTEGER PRIMARY KEY CHECK (one = 1), key BLOB NOT NULL, sealed INTEGER NOT NULL);
    CREATE TABLE samples (
        id INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB NOT NULL UNIQUE, class BLOB, body BLOB NOT NULL,
        sealed INTEGER NOT NULL, bytes INTEGER NOT NULL, source TEXT NOT NULL, correct INTEGER, missed INTEGER,
        loss REAL, created_ms INTEGER NOT NULL, judged_ms INTEGER
    );
    CREATE INDEX sizes ON samples (bytes);
    CREATE INDEX newest ON samples (created_ms, id);
    CREATE INDEX judged ON samples (judged_ms, id) WHERE judged_ms IS NOT NULL;
    CREATE INDEX waiting ON samples (created_ms, id) WHERE judged_ms IS NULL AND source = 'answer';
    CREATE TABLE uses (
        sample INTEGER NOT NULL REFERENCES samples(id) ON DELETE CASCADE, lineage TEXT NOT NULL,
        first INTEGER NOT NULL, last INTEGER NOT NULL, rounds INTEGER NOT NULL, PRIMARY KEY (sample, lineage)
    ) WITHOUT ROWID;
    CREATE TABLE forgotten (digest BLOB PRIMARY KEY, at_ms INTEGER NOT NULL) WITHOUT ROWID
    """,
)
_WHAT: Final = "file of samples"
_LOST: Final = "the samples are lost with it"
_DIGEST_BYTES: Final = 16
_CLASS_BYTES: Final = 8
_USED: Final = "(SELECT coalesce(sum(rounds), 0) FROM uses WHERE sample = id)"
_COLUMNS: Final = f"id, digest, body, sealed, source, correct, missed, loss, created_ms, {_USED}"
_WRONG: Final = "coalesce(missed, 1 - correct, 0) = 1"  # as the model is now; before anybody looked: as it answered
_SLACK: Final = 50
_BATCH: Final = 500  # parameters of one statement

# Answers that nobody has judged go first, then the least useful samples of the largest classes, oldest first.
_LEAST_USEFUL: Final = f"""
    SELECT id, bytes FROM (
        SELECT id, bytes, created_ms, class IS NULL AS bare, useful,
            row_number() OVER (PARTITION BY class ORDER BY useful DESC, created_ms DESC, id DESC) AS place
        FROM (SELECT *, CASE WHEN {_WRONG} THEN 2 WHEN missed IS NULL THEN 1 ELSE 0 END AS useful FROM samples)
    ) ORDER BY bare DESC, place DESC, useful, created_ms, id
"""


def is_sealed(path: Path) -> bool:
    """Whether the samples in this file are encrypted; False when there is no file. Raises DiskError, ConfigError."""
    if not path.exists():
        return False
    with SqliteFile(path, MIGRATIONS, what=_WHAT, lost=_LOST) as file:
        return file.value("SELECT sealed FROM file") == 1


class Samples(SqliteFile):
    """Implements `SampleBuffer` (samples_port.py). Close it with `close` or use it in a `with` block."""

    def __init__(
        self, path: Path | None, limits: Limits, key: Callable[[], bytes], *, encrypt: bool | None = None
    ) -> None:
        """Open or make the file.

        Args:
          path: None keeps everything in memory, for simulations.
          key: `sealing.samples_key` of this node; called only where samples are encrypted, or are to be.
          encrypt: have all of it encrypted, or nothing, first. None: as it is.

        Raises DiskError, ConfigError (written by a newer version, encrypted with another key), and what `key` raises.
        """
        super().__init__(path, MIGRATIONS, what=_WHAT, lost=_LOST)
        self._limits = limits
        try:
            with self._guard():
                self._db.execute("PRAGMA secure_delete=ON")
            self._key = self._file_key(key, encrypt)
        except BaseException:
            self.close()
            raise

    def _file_key(self, key: Callable[[], bytes], encrypt: bool | None) -> bytes:
        with self._transaction():
            row = self._db.execute("SELECT key, sealed FROM file").fetchone()
            if row is None:
                made, wanted = secrets.token_bytes(KEY_BYTES), bool(encrypt)
                self._db.execute("INSERT INTO file VALUES (1, ?, ?)", (seal(key(), made) if wanted else made, wanted))
                return made
            lying, sealed = row
            found = unseal(key(), lying, f"the file of samples {self.path}") if sealed else bytes(lying)
            if encrypt in (None, bool(sealed)):
                return found
            self._db.execute(
                "UPDATE file SET key = ?, sealed = ?", (seal(key(), found) if encrypt else found, encrypt)
            )
            for (id_,) in self._db.execute("SELECT id FROM samples").fetchall():
                body, covered = self._db.execute("SELECT body, sealed FROM samples WHERE id = ?", (id_,)).fetchone()
                if covered != encrypt:
                    changed = seal(found, body) if encrypt else self._uncovered(found, body)
                    self._db.execute("UPDATE samples SET body = ?, sealed = ? WHERE id = ?", (changed, encrypt, id_))
        self._overwrite()
        return found

    # ------------------------------------------------------------ what comes in

    def keep_answer(self, input: str, output: str, wall_ms: int) -> int | None:
        """See samples_port.py."""
        if not input or not output.strip() or text_bytes(input, output) > MAX_SAMPLE_BYTES:
            return None
        with self._transaction():
            kept = self._put(NewSample(input=input, label="", output=output), "answer", wall_ms)
            self._db.execute(
                "DELETE FROM samples WHERE id IN (SELECT id FROM samples WHERE judged_ms IS NULL "
                "AND source = 'answer' ORDER BY created_ms DESC, id DESC LIMIT -1 OFFSET ?)",
                (MAX_ANSWERS,),
            )
            self._evict(but=kept)
        return kept

    def judge(self, id: int, correct: bool, label: str, wall_ms: int) -> Sample:
        """See samples_port.py."""
        with self._transaction():
            known = next(self._read("WHERE id = ? AND source = 'answer'", (id,)), None)
            if known is None:
                raise BadRequest(
                    f"no answer {id} is kept on this device: it keeps the last {MAX_ANSWERS} that nobody has judged, "
                    "and those that somebody has, until they are forgotten or make room for others"
                )
            meant = label.strip() or (known.output.strip() if correct else "")
            if not correct and meant == known.output.strip():
                raise BadRequest(f"the answer {id} is what you name as the right one: then it was right")
            check_sample(NewSample(input=known.input, label=meant or known.output, output=known.output))
            digest = self._digest(known.input, meant, known.output)
            row = self._db.execute("SELECT id FROM samples WHERE digest = ? AND id <> ?", (digest, id)).fetchone()
            if row is not None:  # the same sample, by another way
                self._db.execute("UPDATE OR IGNORE uses SET sample = ? WHERE sample = ?", (id, row[0]))
                self._db.execute("DELETE FROM samples WHERE id = ?", row)
            self._db.execute("DELETE FROM forgotten WHERE digest = ?", (digest,))
            body, sealed = self._body(known.input, known.output, meant)
            self._db.execute(
                "UPDATE samples SET digest = ?, class = ?, body = ?, sealed = ?, bytes = ?, correct = ?, "
                "missed = NULL, loss = NULL, judged_ms = ? WHERE id = ?",
                (digest, self._class(meant), body, sealed, len(body), correct, wall_ms, id),
            )
            self._evict(but=id)
            return next(self._read("WHERE id = ?", (id,)))

    def add(self, samples: Iterable[NewSample], source: Source, wall_ms: int, *, again: bool = False) -> Added:
        """See samples_port.py."""
        new = known = forgotten = 0
        with self._transaction():
            for sample in samples:
                check_sample(sample)
                digest = self._digest(sample.input, sample.label, sample.output)
                if again:
                    self._db.execute("DELETE FROM forgotten WHERE digest = ?", (digest,))
                elif self._db.execute("SELECT 1 FROM forgotten WHERE digest = ?", (digest,)).fetchone():
                    forgotten += 1
                    continue
                there = self._db.execute("SELECT 1 FROM samples WHERE digest = ?", (digest,)).fetchone() is not None
                self._put(sample, source, wall_ms)
                known += there
                new += not there
            return Added(new=new, known=known, forgotten=forgotten, evicted=self._evict())

    def _put(self, sample: NewSample, source: Source, wall_ms: int) -> int:
        """Its id. One that is known becomes as new, and takes what is told about it."""
        body, sealed = self._body(sample.input, sample.output, sample.label)
        (id_,) = self._db.execute(
            "INSERT INTO samples (digest, class, body, sealed, bytes, source, correct, created_ms) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE SET created_ms = excluded.created_ms, "
            "correct = coalesce(excluded.correct, correct) RETURNING id",
            (
                self._digest(sample.input, sample.label, sample.output),
                self._class(sample.label),
                body,
                sealed,
                len(body),
                source,
                sample.correct,
                wall_ms,
            ),
        ).fetchone()
        return int(id_)

    def _evict(self, but: int = 0) -> int:
        """Make room until the limits hold; how many samples that took. `but`: stays, whatever it is worth."""
        count, size = self._db.execute("SELECT count(*), coalesce(sum(bytes), 0) FROM samples").fetchone()
        most = self._limits
        if count <= most.samples and size <= most.size_bytes:
            return 0
        # a little more than has to go, so that not every sample makes room for itself
        count -= most.samples - most.samples // _SLACK
        size -= most.size_bytes - most.size_bytes // _SLACK
        gone: list[int] = []
        for id_, held in self._db.execute(_LEAST_USEFUL):
            if count <= 0 and size <= 0:
                break
            if id_ != but:
                gone.append(id_)
                count, size = count - 1, size - held
        self._db.executemany("DELETE FROM samples WHERE id = ?", [(id_,) for id_ in gone])
        return len(gone)

    # ------------------------------------------------------------ what there is

    def summary(self) -> Summary:
        """See samples_port.py."""
        with self._guard():
            numbers = self._db.execute(
                f"SELECT count(*), count(class), coalesce(sum({_WRONG}), 0), "
                "coalesce(sum(class IS NOT NULL AND id NOT IN (SELECT sample FROM uses)), 0), "
                "coalesce(sum(judged_ms IS NULL AND source = 'answer'), 0), count(DISTINCT class), "
                "coalesce(sum(bytes), 0), (SELECT sealed FROM file) FROM samples"
            ).fetchone()
        samples, labelled, wrong, fresh, answers, classes, size, sealed = numbers
        return Summary(
            samples=samples,
            labelled=labelled,
            wrong=wrong,
            fresh=fresh,
            answers=answers,
            classes=classes,
            size_bytes=size,
            encrypted=bool(sealed),
        )

    def newest(self, count: int | None = None, *, wrong: bool = False, labelled: bool = False) -> Iterator[Sample]:
        """See samples_port.py."""
        where = [*([_WRONG] if wrong else []), *(["class IS NOT NULL"] if labelled else [])]
        condition = f"WHERE {' AND '.join(where)}" if where else ""
        return self._read(f"{condition} ORDER BY created_ms DESC, id DESC LIMIT ?", (-1 if count is None else count,))

    def every(self) -> tuple[int, ...]:
        """The ids of all samples."""
        with self._guard():
            return tuple(id_ for (id_,) in self._db.execute("SELECT id FROM samples ORDER BY id"))

    def find(self, wanted: str) -> tuple[int, ...]:
        """The ids of samples with this id, or whose hash begins like this (8 digits or more)."""
        text = wanted.lower()
        with self._guard():
            rows = self._db.execute(
                "SELECT id FROM samples WHERE CAST(id AS TEXT) = ?1 "
                "OR (length(?1) >= 8 AND substr(lower(hex(digest)), 1, length(?1)) = ?1) ORDER BY id",
                (text,),
            ).fetchall()
        return tuple(id_ for (id_,) in rows)

    def judgements(self, count: int) -> Sequence[bool]:
        """See samples_port.py."""
        with self._guard():
            rows = self._db.execute(
                "SELECT correct FROM samples WHERE judged_ms IS NOT NULL ORDER BY judged_ms DESC, id DESC LIMIT ?",
                (count,),
            ).fetchall()
        return [bool(correct) for (correct,) in rows]

    # ------------------------------------------------------------ training

    def select(self, count: int, seed: int, held_out: Collection[tuple[str, str]] = ()) -> tuple[Sample, ...]:
        """See samples_port.py."""
        barred = {self._digest(input_, label) for input_, label in held_out}
        with self._guard():
            rows = self._db.execute(
                "SELECT id, digest, class, missed, correct, loss, coalesce(used, 0) FROM samples LEFT JOIN (SELECT "
                "sample, sum(rounds) AS used FROM uses GROUP BY sample) ON sample = id WHERE class IS NOT NULL"
            ).fetchall()
        candidates = [
            Candidate(
                id=id_,
                group=group,
                missed=bool(missed) if missed is not None else None if correct is None else not correct,
                loss=loss,
                used=used,
            )
            for id_, digest, group, missed, correct, loss, used in rows
            if digest not in barred
        ]
        chosen = choose(candidates, count, random.Random(seed))
        found = {sample.id: sample for sample in self._named(chosen)}
        return tuple(found[id_] for id_ in chosen if id_ in found)

    def draw(self, rate: float, rng: Randomness) -> tuple[Sample, ...]:
        """See samples_port.py."""
        with self._guard():
            rows = self._db.execute("SELECT id FROM samples WHERE class IS NOT NULL ORDER BY id").fetchall()
        return tuple(self._named([id_ for (id_,) in rows if rng.random() < rate]))

    def note_use(self, ids: Iterable[int], lineage: str, round: int) -> None:
        """See samples_port.py."""
        with self._transaction():
            self._db.executemany(
                "INSERT INTO uses SELECT id, ?2, ?3, ?3, 1 FROM samples WHERE id = ?1 ON CONFLICT (sample, lineage) "
                "DO UPDATE SET rounds = rounds + (last <> excluded.last), first = min(first, excluded.first), "
                "last = max(last, excluded.last)",
                [(id_, lineage, round) for id_ in ids],
            )

    def note_results(self, results: Mapping[int, Result]) -> None:
        """See samples_port.py."""
        with self._transaction():
            self._db.executemany(
                "UPDATE samples SET missed = ?, loss = ? WHERE id = ?",
                [(result.missed, result.loss, id_) for id_, result in results.items()],
            )

    # ------------------------------------------------------------ forgetting

    def forget(self, ids: Iterable[int], wall_ms: int) -> Forgotten:
        """See samples_port.py."""
        windows: dict[str, Window] = {}
        count = 0
        with self._transaction():
            for id_ in ids:
                row = self._db.execute("SELECT digest, class FROM samples WHERE id = ?", (id_,)).fetchone()
                if row is None:
                    continue
                for use in self._db.execute("SELECT lineage, first, last, rounds FROM uses WHERE sample = ?", (id_,)):
                    windows[use[0]] = _joined(windows.get(use[0]), Window(**dict(zip(_WINDOW, use, strict=True))))
                if row[1] is not None:
                    self._db.execute("INSERT OR REPLACE INTO forgotten VALUES (?, ?)", (row[0], wall_ms))
                self._db.execute("DELETE FROM samples WHERE id = ?", (id_,))
                count += 1
            self._db.execute(
                "DELETE FROM forgotten WHERE digest IN "
                "(SELECT digest FROM forgotten ORDER BY at_ms DESC, digest LIMIT -1 OFFSET ?)",
                (MAX_FORGOTTEN,),
            )
        self._overwrite()
        return Forgotten(samples=count, windows=tuple(windows[name] for name in sorted(windows)))

    def _overwrite(self) -> None:
        """Leave nothing of deleted rows in the side file, unless another process is reading there right now."""
        with self._guard():
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    # ------------------------------------------------------------ rows

    def _digest(self, input: str, label: str, output: str = "") -> bytes:
        """Names a sample: its input with its label, or with what was answered while it has none."""
        text = json.dumps([input, label] if label else [input, None, output], ensure_ascii=False)
        return hmac.digest(self._key, b"sample" + text.encode(), hashlib.sha256)[:_DIGEST_BYTES]

    def _class(self, label: str) -> bytes | None:
        if not label:
            return None
        return hmac.digest(self._key, b"class" + label.encode(), hashlib.sha256)[:_CLASS_BYTES]

    def _body(self, input: str, output: str, label: str) -> tuple[bytes, bool]:
        """The bytes of a row, and whether they are sealed: as the file is at this moment."""
        (sealed,) = self._db.execute("SELECT sealed FROM file").fetchone()
        plain = json.dumps([input, output, label], ensure_ascii=False, separators=(",", ":")).encode()
        return (seal(self._key, plain), True) if sealed else (plain, False)

    def _uncovered(self, key: bytes, body: bytes) -> bytes:
        return unseal(key, body, f"a row of the file of samples {self.path}")

    def _named(self, ids: Sequence[int]) -> Iterator[Sample]:
        for at in range(0, len(ids), _BATCH):
            some = ids[at : at + _BATCH]
            yield from self._read(f"WHERE id IN ({','.join('?' * len(some))})", tuple(some))

    def _read(self, condition: str, values: tuple[Any, ...]) -> Iterator[Sample]:
        with self._guard():
            for row in self._db.execute(f"SELECT {_COLUMNS} FROM samples {condition}", values):
                yield self._sample(*row)

    def _sample(
        self,
        id_: int,
        digest: bytes,
        body: bytes,
        sealed: int,
        source: Source,
        correct: int | None,
        missed: int | None,
        loss: float | None,
        created_ms: int,
        used: int,
    ) -> Sample:
        plain = self._uncovered(self._key, body) if sealed else body
        try:
            input_, output, label = json.loads(plain)
        except ValueError as error:
            raise DiskError(
                f"sample {id_} in {self.path} is damaged; take it out: meshnode data forget {id_}"
            ) from error
        return Sample(
            id=id_,
            hash=digest.hex(),
            input=input_,
            output=output,
            label=label,
            source=source,
            correct=None if correct is None else bool(correct),
            missed=None if missed is None else bool(missed),
            loss=loss,
            time_ms=created_ms,
            used=used,
        )


_WINDOW: Final = ("lineage", "first", "last", "rounds")


def _joined(one: Window | None, other: Window) -> Window:
    if one is None:
        return other
    first, last = min(one.first, other.first), max(one.last, other.last)
    rounds = min(last - first + 1, one.rounds + other.rounds)
    return Window(lineage=one.lineage, first=first, last=last, rounds=rounds)
