"""Adapters that are served, read back as what is trained: one to judge, or one that a lesson begins with."""

from __future__ import annotations

from collections.abc import Sequence

from meshnode.core.errors import ModelError
from meshnode.core.workers import Workers
from meshnode.model.adapter import adapter_vector
from meshnode.services.port import Content
from protocols.adapter.manifest import AdapterManifest, decode_adapter
from protocols.delta.frame import Frame, Vector, decode_frame
from protocols.errors import RemoteProtocolError
from protocols.ids import Cid, short
from protocols.manifest.messages import FileRef


def misfit(adapter: Frame, frame: Frame) -> str:
    """What keeps learners of a frame from beginning with an adapter of another one; "" when nothing does. The seed,
    and which factors are trained when, may differ."""
    for name in ("base", "rank", "alpha", "first", "last", "targets"):
        theirs, ours = getattr(adapter, name), getattr(frame, name)
        if theirs != ours:
            return f"its {name} is {_words(theirs)}, not {_words(ours)}"
    return ""


async def read_shape(content: Content, cid: Cid) -> tuple[AdapterManifest, Frame]:
    """An adapter without its factors. Raises ModelError: it is none; ContentUnavailable."""
    try:
        manifest = decode_adapter(await content.block(cid))
        return manifest, decode_frame(await content.block(manifest.frame))
    except RemoteProtocolError as error:
        raise ModelError(f"The adapter {short(cid)} can't be used: {error}") from error


async def read_adapter(content: Content, workers: Workers, cid: Cid) -> tuple[Frame, Vector]:
    """The adapter and its frame. Raises ModelError, ContentUnavailable, DiskError."""
    manifest, frame = await read_shape(content, cid)
    layers: dict[FileRef, bytes] = {}
    for file in manifest.layers:
        with await content.open(file) as path:
            layers[file] = await workers.run(path.read_bytes)
    return frame, await workers.run(adapter_vector, frame, manifest, layers.__getitem__)


async def start_of(content: Content, workers: Workers, frame: Frame, start: Cid | None) -> Vector:
    """What all learners of a lesson begin with: an adapter, or factors by chance that change nothing.

    Raises ModelError: the adapter has another shape than the frame; what `read_adapter` raises.
    """
    if start is None:
        return frame.initial()
    found, vector = await read_adapter(content, workers, start)
    if why := misfit(found, frame):
        raise ModelError(f"The lesson can't begin with the adapter {short(start)}: {why}.")
    return vector


def _words(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(getattr(one, "name", one)) for one in value)
    return str(value)
