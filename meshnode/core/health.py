"""Everything that can be wrong with a node, as a registry of sentences that say what to do.

Services set and clear codes; `meshnode status` and `meshnode doctor` show them; nobody prints.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from meshnode.core.clock import Monotonic, monotonic
from meshnode.core.printable import printable
from protocols.words import shortened


class Severity(IntEnum):
    """HIGH: the mesh can't answer. MEDIUM: it copes, somebody should look. LOW: worth knowing."""

    HIGH = 3
    MEDIUM = 2
    LOW = 1


@dataclass(frozen=True, slots=True)
class HealthCode:
    """One thing that can be wrong.

    `sentence` is a template over the facts given to `Health.set`; `after_s` is how long it must last before
    it is shown; `per` names the fact that tells several of the same code apart; `lasts_s` ends those that
    report an event, infinity at the end of the node; None: whoever sets it clears it.
    """

    code: str
    severity: Severity
    sentence: str
    after_s: float = 0.0
    per: str | None = None
    lasts_s: float | None = None


MAX_PER_CODE: Final = 32  # entries of one code; a further one takes the place of the least recently touched
_H, _M, _L = Severity.HIGH, Severity.MEDIUM, Severity.LOW
_EVENT_S: Final = 600.0  # how long a report of something that happened stays on the screen
_ROLLED_BACK_S: Final = 86_400.0  # somebody should see it, who may look once a day

_REGISTRY: Final = (
    HealthCode(
        "no-peers",
        _M,
        "No peer is connected. Start meshnode on another device and check that it can reach {addresses}; "
        "`meshnode doctor` tests the way.",
        after_s=20,
    ),
    HealthCode(
        "first-node",
        _L,
        "Nobody else is in this network yet. Let another device in with `meshnode invite`.",
    ),
    HealthCode(
        "put-out",
        _H,
        "This node is no member of the network any more: {reason} With one, stop this node and run "
        "`meshnode join TICKET --anew` here.",
    ),
    HealthCode(
        "no-model",
        _M,
        "The network has no model. Add one with `meshnode model add example:smollm2` on a node that may publish.",
        after_s=5,
    ),
    HealthCode(
        "manifest-missing",
        _H,
        "The model {manifest} was added here by its CID, and its manifest has not been found: {reason} It is looked "
        "for by itself; name an IPFS node that has it in content.ipfs_peers, or add another model.",
    ),
    HealthCode(
        "model-refused",
        _M,
        "The model {manifest}, which was chosen here while this node did not run, is not served: {reason}",
        lasts_s=_EVENT_S,
    ),
    HealthCode(
        "audit-failed",
        _H,
        "What this node is asked for is not noted: the audit log in {folder} can't be written: {reason} Free some "
        "space or repair it; `meshnode audit verify` shows what is wrong; audit.enabled = false ends it.",
    ),
    HealthCode(
        "learning-failed",
        _M,
        "This node can't follow the lesson of the network: {reason} It tries again by itself.",
    ),
    HealthCode(
        "release-missing",
        _M,
        "{announced}, which {peer} has announced, has not arrived yet, so {served} is served. Start a node that has "
        "it, or have another model served there (meshnode model serve).",
        after_s=10,
    ),
    HealthCode(
        "adapter-rolled-back",
        _M,
        "The adapter {version} ({adapter}) is not used any more: {reason} {instead} answers. "
        "`meshnode release show {version}` tells more.",
        per="adapter",
        lasts_s=_ROLLED_BACK_S,
    ),
    HealthCode(
        "adapter-held",
        _L,
        "The roll-out of the adapter {version} does not go on: {reason} Nothing has to be done; to end it, "
        "`meshnode release rollback {version}`.",
        per="version",
    ),
    HealthCode(
        "adapter-not-judged",
        _L,
        "This node may vote, but could not judge the adapter {version}: {reason} It is tried again by itself.",
        per="version",
        lasts_s=_EVENT_S,
    ),
    HealthCode(
        "release-words",
        _L,
        "What {peer} says of adapters ({kind}) can't be used and does not count: {reason} Update meshnode there or "
        "here, so that both have the same version.",
        per="peer",
        lasts_s=_EVENT_S,
    ),
    HealthCode(
        "not-covered",
        _H,
        "Nobody serves {layers} of {model}. Start another node, or give a node more memory "
        "(serve.memory): {missing} of memory are missing.",
        after_s=10,
    ),
    HealthCode(
        "does-not-fit",
        _H,
        "No layer of {model} fits into the {memory} that this node gives. Raise serve.memory to at least {needed}.",
    ),
    HealthCode(
        "span-failed",
        _M,
        "Of {model}, {layers} could not be fetched or opened: {reason} It is tried again by itself.",
        after_s=5,
    ),
    HealthCode(
        "model-unusable",
        _H,
        "This node can't run {model}: {reason} It is not tried again before this node starts anew, or the network "
        "serves another model.",
    ),
    HealthCode("loading", _L, "This node is loading {layers} of {model}: {progress}.", after_s=3),
    HealthCode(
        "engine-restarting",
        _M,
        "The engine failed {times}; the last reason: {reason} It is started again; `meshnode doctor` shows its log.",
    ),
    HealthCode(
        "probe-failed",
        _H,
        "A test token did not pass through the chain: {reason} `meshnode doctor` tests every hop.",
        after_s=5,
    ),
    HealthCode(
        "slow-peer",
        _M,
        "{peer} takes {times} times as long for its layers as it says, so answers come slower than predicted: it is "
        "busy with something else, or the way to it is bad. `meshnode doctor` there and here tells more.",
        per="peer",
        lasts_s=_EVENT_S,
    ),
    HealthCode(
        "too-fast",
        _M,
        "{peer} asks us faster than any node needs to ({what}), so it waits, or is not heard. Look at that device; "
        "if it is not to be trusted, put it out of the network.",
        per="peer",
        lasts_s=_EVENT_S,
    ),
    HealthCode(
        "peer-avoided",
        _M,
        "{peer} failed questions of this node and is asked by it only where there is no other way, for {seconds} s: "
        "{reason} It is forgiven when it answers again; if this goes on, look at that device.",
        per="peer",
        lasts_s=_EVENT_S,
    ),
    HealthCode(
        "disk-low",
        _M,
        "{free} are left on the disk that holds the model files: those that nothing needs are removed, and new ones "
        "may not fit. Free some space.",
    ),
    HealthCode(
        "quota-exceeded",
        _M,
        "The model files of this node take {held}, more than its content.quota of {quota}: layers in use, pinned "
        "models and last copies in the mesh stay. Raise content.quota, give other nodes more room, or take a model "
        "away (`meshnode model unpin`, `meshnode model remove`).",
    ),
    HealthCode(
        "few-copies",
        _M,
        "Too few copies in the mesh of {files} of {model} (the fewest: {fewest}; wanted: {wanted}): {reason} "
        "Give a node more room (content.quota), or start another node; if a device dies, they may have to be "
        "published again.",
        after_s=60,
    ),
    HealthCode(
        "clock-off",
        _M,
        "The clock of {peer} and ours differ by {seconds} s. Set the clocks of both devices "
        "(timedatectl set-ntp true).",
        per="peer",
        lasts_s=_EVENT_S,
    ),
    HealthCode("refused-peer", _L, "{peer} was refused: {reason}", per="peer", lasts_s=_EVENT_S),
    HealthCode(
        "may-not-serve",
        _L,
        "This node holds no layers: its certificate lacks the role serve. Let it join again with a ticket that gives "
        "it (`meshnode invite --roles serve`), or set serve.memory to 0.",
    ),
    HealthCode(
        "dated-ahead",
        _M,
        "{peer} passes on word of a model that is dated more than 10 min ahead of the clock here, so it does not "
        "count. Set the clocks of both devices (timedatectl set-ntp true); if ours is right, who signed it is up to "
        "no good.",
        per="peer",
        lasts_s=_EVENT_S,
    ),
    HealthCode(
        "role-missing",
        _M,
        "{peer} {deed}, but lacks the role {role}: nothing of that counts. Give it the role with a new ticket "
        "(`meshnode invite --roles {role}`), or put it out (`meshnode members remove`).",
        per="peer",
        lasts_s=_EVENT_S,
    ),
    HealthCode(
        "bad-provider",
        _M,
        "{peer} {deed}, so nothing is fetched from it until the next start of this node. Let its "
        "owner check what it holds: {check}.",
        per="peer",
        lasts_s=math.inf,
    ),
    HealthCode(
        "guest-unreachable",
        _M,
        "The IPFS node {guest} ({addresses}) has been out of reach since {since}: {reason} Start it, open its TCP "
        "port, or correct {setting}; it is dialled again by itself.",
        after_s=20,
        per="guest",
    ),
    HealthCode(
        "dht-unreachable",
        _M,
        "No DHT peer of {network} answers: {reason} Providers there can't be found. Correct content.dht, or open the "
        "way to them; they are asked again by themselves.",
        after_s=20,
        per="network",
    ),
    HealthCode(
        "dht-no-address",
        _L,
        "This node is not named in the DHT of {network}: it has no address there at which others could reach it. "
        "Write it into network.announce.",
        per="network",
    ),
    HealthCode(
        "ipfs-publish",
        _M,
        "The IPFS daemon at {address} does not keep all that this node holds of {model}: {reason} It is tried again "
        "by itself; `content.ipfs_publish = false` ends it.",
    ),
    HealthCode(
        "ipfs-daemon",
        _M,
        "The IPFS daemon at {address} is not used: {reason} Start or repair it (`ipfs id` must answer), or correct "
        "content.ipfs_api; the mesh goes on without it.",
    ),
    HealthCode(
        "drift",
        _M,
        "{wrong} of the last {judged} answers that were judged on this device were wrong ({percent} %): "
        "`meshnode data list --wrong` shows them. Let the mesh learn from them (learn.enabled = true), or, if they "
        "became worse with a release, go back to the one before (`meshnode release rollback`).",
    ),
    HealthCode(
        "samples-unusable",
        _M,
        "Answers are not kept, and nothing is learned from this device's samples: {reason}",
    ),
    HealthCode(
        "bad-gateway",
        _M,
        "{gateway} sent something else than the block {cid}, so it is not asked again until the next start. It is "
        "damaged or no trustless gateway; take it out of content.gateways.",
        per="gateway",
        lasts_s=math.inf,
    ),
    HealthCode(
        "gateway-unusable",
        _M,
        "The gateway {gateway} gives nothing: {reason} Start or repair it, or correct content.gateways; it is asked "
        "again by itself.",
        after_s=10,
        per="gateway",
    ),
    HealthCode(
        "two-writers",
        _H,
        "Two nodes run with the key of {peer}, so nobody relies on either until one has stopped. Stop the copy: "
        "never copy a data folder, run `meshnode join` on each device.",
        per="peer",
        lasts_s=_EVENT_S,
    ),
)
CODES: Final = {entry.code: entry for entry in _REGISTRY}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What is wrong, as a person sees it."""

    code: str
    severity: Severity
    text: str
    since_s: float  # how long it has lasted, seconds
    facts: dict[str, object]


@dataclass(slots=True)
class _Entry:
    began: float
    touched: float
    facts: dict[str, object]


def _lasts_s(code: HealthCode) -> float:
    return math.inf if code.lasts_s is None else code.lasts_s


class Health:
    """What is wrong with this node right now."""

    def __init__(self, now: Monotonic = monotonic) -> None:
        self._now = now
        self._entries: dict[tuple[str, object], _Entry] = {}

    def set(self, code: str, **facts: object) -> None:
        """Say that something is wrong, with the facts that its sentence needs. Setting again updates the facts.

        Raises KeyError for a code that is not registered, ValueError when a fact is missing (both our bugs).
        """
        known_code = CODES[code]
        missing = {name for _, name, _, _ in string.Formatter().parse(known_code.sentence) if name} - facts.keys()
        if missing:
            raise ValueError(f"the health code {code} needs {', '.join(sorted(missing))}")
        if isinstance(reason := facts.get("reason"), str) and not reason.endswith((".", "!", "?")):
            facts["reason"] = f"{reason}."  # the words of an error; here another sentence may follow them
        now = self._now()
        for over in [k for k, entry in self._entries.items() if now >= entry.touched + _lasts_s(CODES[k[0]])]:
            del self._entries[over]
        key = (code, facts[known_code.per] if known_code.per else None)
        others = [other for other in self._entries if other[0] == code and other != key]
        if len(others) >= MAX_PER_CODE:
            del self._entries[min(others, key=lambda other: self._entries[other].touched)]
        entry = self._entries.setdefault(key, _Entry(now, now, facts))
        entry.facts, entry.touched = facts, now

    def clear(self, code: str, **facts: object) -> None:
        """Say that it is fine again. Without facts, everything of the code is cleared."""
        per = CODES[code].per
        if per and per in facts:
            self._entries.pop((code, facts[per]), None)
        else:
            for key in [key for key in self._entries if key[0] == code]:
                del self._entries[key]

    def current(self, now: float | None = None) -> list[Shown]:
        """What is to be shown, most severe first, then oldest first."""
        at = self._now() if now is None else now
        shown = []
        for (name, _), entry in self._entries.items():
            code = CODES[name]
            if entry.began + code.after_s <= at < entry.touched + _lasts_s(code):
                shown.append(
                    Shown(
                        code=name,
                        severity=code.severity,
                        text=printable(shortened(code.sentence.format(**entry.facts))),
                        since_s=at - entry.began,
                        facts=dict(entry.facts),
                    )
                )
        return sorted(shown, key=lambda s: (-s.severity, -s.since_s, s.code, s.text))
