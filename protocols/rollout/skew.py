"""Why a candidate can't be used or judged here, in words that say who has to do what."""

from __future__ import annotations

from dataclasses import dataclass

from protocols.ids import Cid, short
from protocols.rollout.messages import Candidate, Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What the network serves and learns with."""

    base: Cid  # manifest of the model release
    version: str  # of it
    suite: str  # CID of the samples that adapters are judged on; empty: the network has no lesson


def foreign(candidate: Candidate, served: Served) -> str | None:
    """Why it can't be used beside what is served; None: it can."""
    version, base = Version.parse(candidate.version), Version.parse(served.version)
    if candidate.base != served.base:
        return (
            f"it is for another model release ({short(candidate.base)}, {candidate.version}) than the one that is "
            f"served ({short(served.base)}, {served.version}), and can be used when that one is"
        )
    if version.base != base.base:
        return (
            f"it calls itself {candidate.version}, but the release that it names is {served.version}; its version "
            "must begin with that"
        )
    if not served.suite:
        return "the network has no lesson, so there is nothing to judge it on; a publisher has to give one"
    if candidate.suite != served.suite:
        return (
            f"it was proposed for other held-out samples ({short(candidate.suite)}) than those of the lesson "
            f"({short(served.suite)}); propose it again for these"
        )
    return None


def behind(candidate: Candidate, head: Candidate | None) -> str | None:
    """Why it is not judged by a node that serves `head` (None: the model alone); None: it builds on that."""
    serves = head.adapter if head is not None else ""
    if candidate.previous == serves:
        if head is not None and Version.parse(candidate.version) <= Version.parse(head.version):
            return f"it calls itself {candidate.version} and is to replace {head.version}; a release must count up"
        return None
    ours = Version.parse(head.version).adapter if head is not None else 0
    shown = f"{head.version} ({short(serves)})" if head is not None else "the model without an adapter"
    builds_on = short(candidate.previous) if candidate.previous else "the model without an adapter"
    if Version.parse(candidate.version).adapter <= ours + 1:
        return (
            f"it builds on {builds_on}, but {shown} is served here; whoever proposed it is behind, and has to learn "
            "on from that"
        )
    return f"it builds on {builds_on}, which has not been released here yet; {shown} is served here, which is behind"
