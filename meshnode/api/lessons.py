"""Giving a lesson: from what a person says to what the network reads."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from meshnode.api.messages import Json
from meshnode.api.releases import find_release
from meshnode.core.errors import BadRequest, Declined, DiskError, ModelError
from meshnode.model.adapter_fit import MAX_RANK
from meshnode.node import Node
from meshnode.services.learning.adapters import misfit, read_shape
from meshnode.services.learning.lessons import read_suite
from meshnode.services.port import Content
from protocols.codec import encode
from protocols.delta.frame import FACTORS, TARGETS, Frame, Target, encode_frame
from protocols.delta.messages import Codec
from protocols.errors import ProtocolError
from protocols.ids import DAG_CBOR, Cid, cid_codec, cid_to_bytes, short
from protocols.lesson.messages import (
    MAX_BATCH,
    MAX_GATE,
    MAX_LEAST,
    MAX_MIXES,
    MAX_ROUNDS,
    MAX_STEPS,
    MAX_SUITE_BYTES,
    MAX_WAIT_S,
    MODES,
    Lesson,
    lesson_cid,
)
from protocols.manifest.messages import TRAIN, Manifest
from protocols.membership.messages import FORBIDDEN, PUBLISH
from protocols.notice.messages import LESSON

SUITE_PIN: Final = "learning-suite"
RELEASED: Final = "released"  # a lesson begins with the adapter that is, if it fits
NO_START: Final = "none"
_CODECS: Final = {codec.name.lower(): codec for codec in Codec}
_DEFAULTS: Final[dict[str, Any]] = {
    "model": "",
    "mode": "pairwise",
    "codec": "int8",
    "rounds": 12,
    "steps": 5,
    "batch": 8,
    "rate": 5e-3,
    "mixes": 2,
    "wait": 600,
    "least": 2,
    "gate": 64,
    "layers": "",
    "targets": "q,v",
    "rank": 8,
    "alpha": 16,
    "factors": "both",
    "period": 1,
    "seed": None,
    "start": RELEASED,
}


async def give_lesson(node: Node, request: Json) -> Json:
    """Read the fields of the command `learn-start`, keep the suite, and tell everybody; the lesson in words.

    Raises BadRequest, ModelError, DiskError; Declined `forbidden`.
    """
    if not node.rights.has(node.identity.peer_id, PUBLISH):
        raise Declined(
            FORBIDDEN,
            f"This node may not give lessons: its certificate lacks the role {PUBLISH}. Give it on a founder's "
            "device, or let this one join again with a ticket that gives the role (meshnode invite --roles).",
        )
    unknown = sorted(set(request) - set(_DEFAULTS) - {"do", "suite"})
    if unknown:
        raise BadRequest(f"a lesson has no {unknown[0]}; it has {', '.join(_DEFAULTS)}")
    usual = {"mode": node.config.learn.mode.replace("allreduce", "group")}
    given = {**_DEFAULTS, **usual, **{name: value for name, value in request.items() if value is not None}}
    cid, manifest = _release(node, str(given["model"]))
    config = await _config(node.content, manifest)
    frame = frame_of(cid, manifest, config, given)
    start = await _start(node, frame, str(given["start"]))
    suite, size = await node.parts.workers.run(_keep_suite, node, Path(str(request.get("suite") or "")))
    lesson = Lesson(
        created_ms=node.parts.wall(),
        frame=encode_frame(frame),
        suite=cid_to_bytes(suite),
        suite_size=size,
        mode=_choice(given, "mode", MODES),
        codec=_CODECS[_choice(given, "codec", tuple(_CODECS))],
        rounds=_number(given, "rounds", 1, MAX_ROUNDS),
        steps=_number(given, "steps", 0, MAX_STEPS),
        batch=_number(given, "batch", 1, MAX_BATCH),
        rate_micro=round(_real(given, "rate", 1e-6, 1.0) * 1e6),
        mixes=_number(given, "mixes", 0, MAX_MIXES),
        wait_s=_number(given, "wait", 1, MAX_WAIT_S),
        least=_number(given, "least", 1, MAX_LEAST),
        gate=_number(given, "gate", 0, MAX_GATE),
        start=b"" if start is None else cid_to_bytes(start),
    )
    content = encode(lesson)
    node.directory.notices.give(LESSON, content)
    return {
        "lesson": lesson_cid(content),
        "frame": frame.cid,
        "frame_block": base64.b64encode(lesson.frame).decode(),
        "model": cid,
        "start": start or "",
        "layers": [frame.first, frame.last],
        "targets": [target.name for target in frame.targets],
        "parameters": frame.parameters,
        "rounds": lesson.rounds,
        "steps": lesson.steps,
        "mode": lesson.mode,
    }


def _release(node: Node, wanted: str) -> tuple[Cid, Manifest]:
    """The model that is adapted: the one that is named, or the one that is served."""
    if wanted:
        cid, manifest, _ = find_release(node.database, node.store, wanted, TRAIN)
    else:
        served = node.releases.current
        if served is None:
            raise ModelError(f"say which model is to learn (--model): {node.releases.why_none}")
        cid, manifest = served.cid, served.manifest
    if TRAIN not in manifest.variants:
        raise ModelError(
            f"{manifest.name} was published without the variant {TRAIN}, which learning needs. Publish it again: "
            f"meshnode model add ... --variant {min(manifest.servable)} --variant {TRAIN}"
        )
    return cid, manifest


async def _start(node: Node, frame: Frame, wanted: str) -> Cid | None:
    """The adapter that the lesson begins with. Raises BadRequest, ModelError, ContentUnavailable."""
    if wanted == NO_START:
        return None
    if wanted == RELEASED:
        head = node.rollout.head
        if head is None or head.base != frame.base:
            return None
        _, released = await read_shape(node.content, Cid(head.adapter))
        return None if misfit(released, frame) else Cid(head.adapter)
    try:
        fits = cid_codec(Cid(wanted)) == DAG_CBOR
    except ProtocolError:
        fits = False
    if not fits:
        raise BadRequest(f"start is {wanted[:80]!r}; it takes {RELEASED}, {NO_START}, or the CID of an adapter")
    _, named = await read_shape(node.content, Cid(wanted))
    if why := misfit(named, frame):
        raise BadRequest(f"the lesson can't begin with the adapter {short(wanted)}: {why}")
    return Cid(wanted)


async def _config(content: Content, manifest: Manifest) -> Json:
    """The checkpoint's config.json, which says how wide its layers are."""
    ref = manifest.files.get("config.json")
    if ref is None:
        raise ModelError(f"{manifest.name} was published without config.json, which learning needs")
    with await content.open(ref) as path:
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ModelError(f"config.json of {manifest.name} can't be read: {error}") from error
    if not isinstance(document, dict):
        raise ModelError(f"config.json of {manifest.name} is no object")
    return document


def frame_of(base: Cid, manifest: Manifest, config: Json, given: Json) -> Frame:
    """The frame that a person's words describe. Raises BadRequest."""
    shape = manifest.architecture
    first, last = _layers(str(given["layers"]), shape.layers)
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    middle = config.get("intermediate_size")
    sizes = {"q_proj": (shape.hidden, query), "k_proj": (shape.hidden, key), "v_proj": (shape.hidden, key)}
    sizes["o_proj"] = (query, shape.hidden)
    if isinstance(middle, int):
        sizes |= {"gate_proj": (shape.hidden, middle), "up_proj": (shape.hidden, middle)}
        sizes["down_proj"] = (middle, shape.hidden)
    words = str(given["targets"])
    names = set(TARGETS) if words == "all" else {_target(word) for word in words.split(",")}
    if not names <= sizes.keys():
        raise BadRequest(f"{manifest.name} has no single {min(names - sizes.keys())} that could learn")
    seed = given["seed"]
    factors = _choice(given, "factors", FACTORS)
    return Frame(
        base=base,
        rank=_number(given, "rank", 1, MAX_RANK),
        alpha=_number(given, "alpha", 1, 4096),
        targets=tuple(Target(name, *sizes[name]) for name in TARGETS if name in names),
        first=first,
        last=last,
        seed=secrets.randbits(62) if seed is None else _number(given, "seed", 0, (1 << 62) - 1),
        factors=factors,
        period=_number(given, "period", 1, 1 << 20) if factors == "alternating" else 1,
    )


def _layers(words: str, layers: int) -> tuple[int, int]:
    """ "20-29", or the upper third."""
    if not words:
        return layers - max(1, round(layers / 3)), layers
    if words == "all":
        return 0, layers
    first, _, last = words.partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < layers):
        raise BadRequest(
            f"layers is {words[:40]!r}; it takes all, or the first and the last one, like 20-{layers - 1}"
        )
    return int(first), int(last) + 1


def _target(word: str) -> str:
    name = word.strip()
    name = name if name.endswith("_proj") else f"{name}_proj"
    if name not in TARGETS:
        short = ", ".join(target.removesuffix("_proj") for target in TARGETS)
        raise BadRequest(f"targets names {word.strip()[:40]!r}; there are {short}, or all")
    return name


def _keep_suite(node: Node, path: Path) -> tuple[Cid, int]:
    """Have the suite in our store, where the others fetch it. Raises BadRequest, ModelError, DiskError."""
    if not path.is_absolute():
        raise BadRequest("suite takes the path of a file with held-out samples")
    try:
        size = path.stat().st_size
        if size > MAX_SUITE_BYTES:
            raise BadRequest(f"the suite {path} has {size} bytes; {MAX_SUITE_BYTES} are possible")
        read_suite(path.read_bytes())
    except OSError as error:
        raise DiskError(f"the suite {path} can't be read: {error.strerror or error}") from error
    cid = node.store.add_file(path, pin=SUITE_PIN)
    node.store.pin_only(SUITE_PIN, (cid,))
    return cid, size


def _choice(given: Json, name: str, choices: tuple[str, ...]) -> str:
    if given[name] not in choices:
        raise BadRequest(f"{name} is {str(given[name])[:40]!r}; it takes {', '.join(choices)}")
    return str(given[name])


def _number(given: Json, name: str, low: int, high: int) -> int:
    return int(_checked(given, name, low, high, lambda value: isinstance(value, int)))


def _real(given: Json, name: str, low: float, high: float) -> float:
    return float(_checked(given, name, low, high, lambda value: isinstance(value, (int, float))))


def _checked(given: Json, name: str, low: float, high: float, fits: Callable[[object], bool]) -> Any:
    value = given[name]
    if isinstance(value, bool) or not fits(value) or not low <= value <= high:
        raise BadRequest(f"{name} is {str(value)[:40]}; it takes a number from {low} to {high}")
    return value
