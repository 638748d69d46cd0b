"""Releases of adapters, in plain data: what is known of them, proposing one, going back from one."""

from __future__ import annotations

import dataclasses

from meshnode.api.messages import Json, ReleaseStatus, RolledBack
from meshnode.core.errors import BadRequest, Declined
from meshnode.node import Node
from protocols.adapter.manifest import decode_adapter
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, Cid, cid_codec
from protocols.rollout.state import Release

MAX_WHY = 100  # characters of a reason


def releases_of(node: Node) -> tuple[ReleaseStatus, ...]:
    """Every candidate that this node knows, the newest first."""
    return tuple(_status(node, release) for release in node.rollout.releases())


def as_json(releases: tuple[ReleaseStatus, ...]) -> list[Json]:
    """As a list of objects."""
    return [dataclasses.asdict(release) for release in releases]


async def propose(node: Node, wanted: object) -> Json:
    """Propose the adapter with this CID; the candidate. Raises Declined, BadRequest, ContentUnavailable."""
    cid = _adapter_cid(wanted)
    try:
        manifest = decode_adapter(await node.content.block(cid))
    except RemoteProtocolError as error:
        raise Declined("bad-adapter", f"{cid} is not the manifest of an adapter: {error}") from error
    candidate = node.rollout.propose(cid, manifest.base, manifest.frame)
    return dataclasses.asdict(_status(node, node.rollout.find(candidate.adapter)))


def roll_back(node: Node, wanted: object, why: object) -> Json:
    """Go back from a release (empty: the one in use), and vote against it where this node may vote."""
    if not isinstance(wanted, str) or not isinstance(why, str):
        raise BadRequest("rollback takes a release and a reason in text")
    if len(why) > MAX_WHY or not why.isprintable():
        raise BadRequest(f"a reason has at most {MAX_WHY} characters, in one line")
    release = _status(node, node.rollout.roll_back(wanted, why or "a person said so"))
    return dataclasses.asdict(RolledBack(release=release, effect=_effect(node, release)))


def _effect(node: Node, release: ReleaseStatus) -> str:
    if not node.rollout.may_vote:
        return (
            f"This node does not use {release.version} any more. The others go on with it: this node's certificate "
            "lacks the role vote."
        )
    if node.membership.is_founder(node.identity.peer_id):
        return f"{release.version} ends everywhere, as soon as the others hear of it: this is a founder's device."
    return (
        f"This node does not use {release.version} any more, and has voted against it. It ends everywhere when a "
        f"third of the {release.voters} voters say so."
    )


def _adapter_cid(wanted: object) -> Cid:
    try:
        if isinstance(wanted, str) and cid_codec(wanted) == DAG_CBOR:
            return Cid(wanted)
    except RemoteProtocolError:
        pass
    raise BadRequest(f"adapter is {repr(wanted)[:80]}; it takes the CID of an adapter, which begins with bafyrei")


def _status(node: Node, release: Release) -> ReleaseStatus:
    counted = release.counted
    candidate = counted.candidate
    return ReleaseStatus(
        version=candidate.version,
        adapter=candidate.adapter,
        candidate=release.id,
        phase=release.phase.value,
        why=release.why,
        share_percent=release.share / 10,
        in_use=release.in_use,
        previous=candidate.previous,
        base=candidate.base,
        frame=candidate.frame,
        suite=candidate.suite,
        round=candidate.round,
        parents=candidate.parents,
        proposers=counted.proposers,
        votes=len(counted.voted),
        in_favour=len(counted.favour),
        voters=node.rollout.voters(),
        median=None if counted.median is None else counted.median / 1e6,
        right=release.right,
        wrong=release.wrong,
    )
