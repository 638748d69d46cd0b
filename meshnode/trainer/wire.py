"""What node and trainer say to each other: one JSON object a line, over the child's standard input and output.

    node:    {"kind": "train" | "local" | "evaluate", "folder": PATH, "job": {...}}   one at a time
    trainer: {"step": [number, loss or null, seconds]}                any number of times
             {"done": {...}} or {"error": "model" | "bad-request" | "disk", "text": "..."}

Vectors and tables lie in files of the job's folder: NumPy's own format without objects. Samples are in the line, so
that they are on no disk because of us.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, Final

import numpy as np

from meshnode.core.errors import BadRequest, DiskError, FatalError, ModelError
from meshnode.trainer.port import (
    EvaluateJob,
    Evaluation,
    LocalJob,
    ModelFiles,
    Privacy,
    Sample,
    Schedule,
    Step,
    TrainJob,
)
from protocols.delta.frame import Vector, decode_frame, encode_frame
from protocols.errors import MeshError

MAX_LINE_BYTES: Final = 1 << 28  # of a job: its samples
VECTOR: Final = "vector.npy"  # what was trained, in the job's folder
Json = dict[str, Any]
Job = TrainJob | LocalJob | EvaluateJob

_KINDS: Final = {TrainJob: "train", LocalJob: "local", EvaluateJob: "evaluate"}
_ERRORS: Final[dict[str, type[FatalError | BadRequest]]] = {
    "model": ModelError,
    "bad-request": BadRequest,
    "disk": DiskError,
}


def pack_job(job: Job, folder: Path) -> bytes:
    """One line. The vectors of the job are written into `folder`. Raises BadRequest, DiskError."""
    raw: Json = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    raw["model"] = _model_to_json(job.model)
    raw["samples"] = [[sample.input, sample.label] for sample in job.samples]
    for name in ("folder", "optimiser", "cache"):
        if raw.get(name) is not None:
            raw[name] = str(raw[name])
    if not isinstance(job, EvaluateJob):
        raw["schedule"] = dataclasses.asdict(job.schedule)
    if not isinstance(job, LocalJob):
        raw["frame"] = base64.b64encode(encode_frame(job.frame)).decode()
    if isinstance(job, TrainJob):
        raw["privacy"] = None if job.privacy is None else dataclasses.asdict(job.privacy)
        raw["start"] = _vector_to_file(job.start, folder / "start.npy")
    if isinstance(job, EvaluateJob):
        raw["adapters"] = [
            _vector_to_file(a, folder / f"adapter-{k}.npy") if isinstance(a, np.ndarray) else a and str(a)
            for k, a in enumerate(job.adapters)
        ]
    message = {"kind": _KINDS[type(job)], "folder": str(folder), "job": raw}
    line = json.dumps(message, ensure_ascii=True).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise BadRequest(f"The samples of a job take {len(line)} bytes; {MAX_LINE_BYTES} are possible. Take fewer.")
    return line


def unpack_job(line: bytes) -> tuple[Job, Path]:
    """A job, and the folder for files that travel with it. Raises BadRequest when its files can't be read."""
    message = json.loads(line)
    folder = Path(message["folder"])
    raw: Json = message["job"]
    raw["model"] = _model_from_json(raw["model"])
    raw["samples"] = tuple(Sample(*pair) for pair in raw["samples"])
    for name in ("folder", "optimiser", "cache"):
        if raw.get(name) is not None:
            raw[name] = Path(raw[name])
    if "schedule" in raw:
        raw["schedule"] = Schedule(**raw["schedule"])
    if "frame" in raw:
        raw["frame"] = decode_frame(base64.b64decode(raw["frame"]))
    match message["kind"]:
        case "train":
            raw["privacy"] = None if raw["privacy"] is None else Privacy(**raw["privacy"])
            raw["start"] = read_vector(Path(raw["start"]))
            raw["factors"] = tuple(raw["factors"])
            return TrainJob(**raw), folder
        case "local":
            raw["targets"] = tuple(raw["targets"])
            return LocalJob(**raw), folder
        case _:
            raw["adapters"] = tuple(_adapter_from(entry, folder) for entry in raw["adapters"])
            raw["labels"] = tuple(raw["labels"])
            return EvaluateJob(**raw), folder


def identity_of(job: TrainJob | LocalJob) -> str:
    """What makes two jobs the same one: everything but where its files lie."""
    raw = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    for name in ("folder", "cache", "start", "frame", "optimiser"):
        raw.pop(name, None)
    raw["model"] = job.model.name
    digest = hashlib.sha256(repr(sorted(raw.items())).encode())
    if isinstance(job, TrainJob):
        digest.update(job.frame.cid.encode() + job.start.tobytes())
        digest.update(b"" if job.optimiser is None else str(job.optimiser).encode())
    return digest.hexdigest()


def evaluations_to_files(found: list[Evaluation], folder: Path) -> Json:
    """Raises DiskError."""
    for k, one in enumerate(found):
        for name in ("losses", "scores", "right"):
            _save(folder / f"{name}-{k}.npy", getattr(one, name))
    return {"labels": list(found[0].labels) if found else []}


def evaluations_from_files(done: Json, folder: Path, job: EvaluateJob) -> tuple[Evaluation, ...]:
    """One for each adapter of the job. Raises BadRequest, KeyError, TypeError, ValueError for what is none."""
    labels = tuple(map(str, done["labels"]))
    found = []
    for k in range(len(job.adapters)):
        tables = {name: _load(folder / f"{name}-{k}.npy") for name in ("losses", "scores", "right")}
        count, shapes = len(job.samples), tuple(table.shape for table in tables.values())
        if shapes != ((count,), (count, len(labels)), (count,)) or tables["right"].dtype != np.bool_:
            raise ValueError(f"tables of the shapes {shapes} for {count} samples and {len(labels)} labels")
        found.append(Evaluation(labels=labels, **tables))
    return tuple(found)


def step_to_json(step: Step) -> Json:
    return {"step": [step.number, None if math.isnan(step.loss) else step.loss, step.seconds]}


def error_to_json(error: MeshError) -> Json:
    kind = next((name for name, known in _ERRORS.items() if isinstance(error, known)), "bad-request")
    return {"error": kind, "text": str(error)}


def unpack_answer(line: bytes | bytearray) -> Step | Json | FatalError | BadRequest:
    """A step, what is said when a job is done, or why it can't be. Raises ValueError for anything else."""
    try:
        raw = json.loads(line)
        if "step" in raw:
            number, loss, seconds = raw["step"]
            return Step(int(number), math.nan if loss is None else float(loss), float(seconds))
        if "error" in raw:
            return _ERRORS[raw["error"]](str(raw["text"])[:2000])
        return dict(raw["done"])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("no answer of a trainer") from error


def write_vector(path: Path, vector: Vector) -> None:
    """Raises DiskError."""
    _save(path, np.ascontiguousarray(vector, np.float32))


def read_vector(path: Path) -> Vector:
    """Raises BadRequest when the file holds no float32 vector."""
    found: Vector = _load(path)
    if found.dtype != np.float32 or found.ndim != 1:
        raise BadRequest(f"{path} holds no vector of float32.")
    return found


def _vector_to_file(vector: Vector, path: Path) -> str:
    write_vector(path, vector)
    return str(path)


def _adapter_from(entry: str | None, folder: Path) -> Vector | Path | None:
    if entry is None:
        return None
    path = Path(entry)
    return read_vector(path) if path.parent == folder and path.suffix == ".npy" else path


def _model_to_json(model: ModelFiles) -> Json:
    paths = {"config": str(model.config), "tokenizer": str(model.tokenizer), "index": str(model.index)}
    return {"name": model.name, **paths, "groups": {name: str(path) for name, path in model.groups.items()}}


def _model_from_json(raw: Json) -> ModelFiles:
    paths = {name: Path(raw[name]) for name in ("config", "tokenizer", "index")}
    return ModelFiles(name=raw["name"], **paths, groups={name: Path(path) for name, path in raw["groups"].items()})


def _save(path: Path, values: Any) -> None:
    try:
        with path.open("wb") as file:
            np.save(file, values, allow_pickle=False)
    except OSError as error:
        raise DiskError(f"{path} can't be written: {error.strerror or error}.") from error


def _load(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadRequest(f"{path} can't be read: {error}.") from error
