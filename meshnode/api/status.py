"""What a node says about itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection

import psutil

from meshnode import __version__
from meshnode.api.messages import (
    ContentStatus,
    CopiesStatus,
    DhtStatus,
    DutyStatus,
    EngineStatus,
    HealthStatus,
    LearningStatus,
    PeerStatus,
    ProgressStatus,
    RefusalStatus,
    SamplesStatus,
    ServedModel,
    SpanStatus,
    Status,
)
from meshnode.api.rollouts import releases_of
from meshnode.core.errors import DiskError
from meshnode.model.release import ServedRelease
from meshnode.node import Node
from meshnode.policy.duty import Duty, duty_of
from meshnode.services.inference.readiness import Readiness
from protocols.advert.messages import Advert
from protocols.ids import PeerId


def status_of(node: Node, api_url: str = "") -> Status:
    """Everything that `meshnode status` shows. `api_url`: where the node answers HTTP."""
    live = node.directory.live()
    served = node.releases.current
    ready = node.readiness.now if served is not None else Readiness(False, node.releases.why_none)
    prediction = node.placement.prediction
    peers = [_peer(node, advert) for peer, advert in live.items() if peer != node.identity.peer_id]
    return Status(
        software=__version__,
        peer=node.identity.peer_id,
        pid=os.getpid(),
        network=node.membership_file.network.name,
        addresses=tuple(node.host.addresses),
        api_url=api_url,
        uptime_s=round((node.parts.wall() - node.began_ms) / 1000, 1),
        ready=ready.ready,
        readiness=ready.sentence,
        model=None if served is None else model_of(served),
        prediction="" if prediction is None else prediction.text,
        predicted_tok_s=0.0 if prediction is None else prediction.mesh_milli / 1000,
        me=_peer(node, live[node.identity.peer_id]),
        peers=tuple(peers),
        duty=duty_status(node),
        progress=_progress(node),
        sessions=node.origin.running,
        rss_bytes=psutil.Process().memory_info().rss,
        torch_imported="torch" in sys.modules,
        engine=_engine(node),
        content=_content(node, served),
        copies=None if served is None else _copies(node, served),
        samples=_samples(node),
        releases=releases_of(node),
        learning=_learning(node),
        upstream={model: tuple(peers) for model, peers in node.upstream.offers().items()},
        health=tuple(
            HealthStatus(code=warning.code, severity=warning.severity.name.lower(), text=warning.text)
            for warning in node.health.current()
        ),
        refusals=tuple(
            RefusalStatus(at_ms=r.at_ms, peer=r.peer, code=r.code, text=r.sentence, by_us=r.by_us)
            for r in node.membership.refusals
        ),
        unreachable={str(who): why for who, why in (node.dialling.failures() | node.external.failures()).items()},
    )


def model_of(served: ServedRelease) -> ServedModel:
    return ServedModel(
        name=served.manifest.name,
        version=served.manifest.version,
        manifest=served.cid,
        variant=served.variant_name,
        layers=served.manifest.architecture.layers,
    )


def _peer(node: Node, advert: Advert) -> PeerStatus:
    peer = PeerId(advert.peer)
    serving = advert.serving
    span, target = (None, None) if serving is None else (serving.span, serving.target)
    us = node.host.round_trip_us(peer)
    return PeerStatus(
        peer=peer,
        name=advert.name,
        connected=peer in node.host.peers,
        roles=tuple(sorted(node.membership.roles_of(peer) or ())),
        round_trip_ms=None if us is None else round(us / 1000, 2),
        memory_bytes=advert.memory_bytes,
        state="idle" if serving is None else serving.state,
        first=None if span is None else span.first,
        last=None if span is None else span.last,
        target=None if target is None else (target.first, target.last),
        sessions=0 if serving is None else serving.sessions,
        layer_decode_us=advert.layer_decode_us,
        layer_prefill_us=advert.layer_prefill_us,
        age_s=node.directory.age_s(peer),
        incarnation=advert.incarnation,
        trouble=advert.trouble,
        duty=duty_of(advert.tags).word,
    )


def duty_status(node: Node) -> DutyStatus:
    """What the owner has the node do."""
    owner, order = node.owner, node.owner.order
    return DutyStatus(
        duty=owner.duty.word,
        why=owner.why,
        ordered="" if order is None else Duty(order.duty).word,
        since_ms=0 if order is None else order.since_ms,
        until_ms=0 if order is None else order.until_ms,
    )


def _progress(node: Node) -> ProgressStatus | None:
    progress = node.spans.loading
    if progress is None:
        return None
    span = progress.span
    return ProgressStatus(
        span=SpanStatus(manifest=span.manifest, variant=span.variant, first=span.first, last=span.last),
        phase=progress.phase,
        files=progress.files,
        files_done=progress.files_done,
        bytes_total=progress.bytes_total,
        bytes_done=progress.bytes_done,
    )


def _engine(node: Node) -> EngineStatus | None:
    stage = node.spans.serving
    if stage is None:
        return None
    return EngineStatus(
        pid=stage.report.pid,
        rss_bytes=stage.engine.rss_bytes,
        weight_bytes=stage.report.weight_bytes,
        kept_bytes=stage.engine.kept_bytes,
    )


def _content(node: Node, served: ServedRelease | None) -> ContentStatus:
    usage = node.store.usage()
    dht = node.dht
    hot, warm, cold = (0, 0, 0) if served is None else _tiers(node, served)
    return ContentStatus(
        used_bytes=usage.used_bytes,
        quota_bytes=usage.quota_bytes,
        free_disk_bytes=usage.free_disk_bytes,
        room_bytes=usage.room_bytes,
        fetched_bytes=node.content.bytes_fetched,
        served_bytes=node.content.bytes_served,
        bad_providers={str(peer): why for peer, why in node.content.bad_providers().items()},
        encrypted=node.config.content.encrypt,
        guests={str(peer): peer in node.host.guests for peer in node.external.configured},
        published=0 if node.daemon is None else len(node.daemon.published),
        visitors=len(node.external.came),
        dht=None
        if dht is None
        else DhtStatus(peers=dht.known_peers, provided=sum(count > 0 for count in dht.provided.values())),
        hot_bytes=hot,
        warm_bytes=warm,
        cold_bytes=cold,
    )


def _tiers(node: Node, served: ServedRelease) -> tuple[int, int, int]:
    """Bytes of the served model by how far away they are: mapped by our engine, on our disk, elsewhere."""
    variant = served.variant
    every = {ref.cid: ref.size for ref in variant.files().values()}
    stage = node.spans.serving
    mapped: Collection[str] = ()
    if stage is not None and served.layers_of(stage.span) is not None:
        mapped = {ref.cid for ref in variant.groups(stage.span.first, stage.span.last).values()}
    here = node.store.files()
    hot = sum(size for cid, size in every.items() if cid in mapped)
    warm = sum(size for cid, size in every.items() if cid in here and cid not in mapped)
    return hot, warm, sum(every.values()) - hot - warm


def _learning(node: Node) -> LearningStatus:
    report = node.learning.report
    return LearningStatus(
        state=report.state,
        why=report.why,
        lesson=report.lesson,
        frame=report.frame,
        model=report.model,
        mode=report.mode,
        round=report.round,
        rounds=report.rounds,
        steps=report.steps,
        samples=report.samples,
        participants=report.participants,
        losses=tuple(round(loss, 5) for loss in report.losses),
        train_s=round(report.train_s, 2),
        sent_bytes=report.sent_bytes,
        fetched_bytes=report.fetched_bytes,
        published=report.published,
        mixed=report.mixed,
        skipped=dict(report.skipped),
        refused=dict(report.refused),
        refusals=tuple(report.refusals),
        paused=report.paused,
        adapter=report.adapter,
    )


def _samples(node: Node) -> SamplesStatus:
    try:
        kept, drift = node.samples.buffer.summary(), node.samples.look()
    except DiskError:  # the node says so in its health
        return SamplesStatus()
    return SamplesStatus(
        samples=kept.samples,
        labelled=kept.labelled,
        fresh=kept.fresh,
        answers=kept.answers,
        classes=kept.classes,
        size_bytes=kept.size_bytes,
        encrypted=kept.encrypted,
        judged=drift.judged,
        judged_wrong=drift.wrong,
    )


def _copies(node: Node, served: ServedRelease) -> CopiesStatus | None:
    copies = node.replication.copies()
    if copies is None:
        return None
    variant = served.variant
    named = {**variant.files(), **served.manifest.files}
    return CopiesStatus(
        wanted=copies.wanted,
        nodes=copies.nodes,
        fewest=copies.fewest,
        files=len(copies.of_file),
        short=len(copies.short),
        planned=copies.planned,
        groups={name: copies.of_file.get(file.cid, 0) for name, file in named.items()},
    )
