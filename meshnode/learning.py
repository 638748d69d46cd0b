"""The services of a node that have to do with learning: what it learns with, and what of that is served."""

from __future__ import annotations

from meshnode.config.settings import Config, LearnSection
from meshnode.config.values import hours_of
from meshnode.membership.rights import Rights
from meshnode.parts import Parts
from meshnode.policy.idle import IdleRule
from meshnode.services.content.service import ContentService
from meshnode.services.directory.directory import DirectoryService
from meshnode.services.learning.ground import Ground
from meshnode.services.learning.permission import IdlePermission
from meshnode.services.learning.rhythm import Rhythm
from meshnode.services.learning.service import LearningService, School
from meshnode.services.membership import MembershipService
from meshnode.services.port import Attention, Judge, Owner
from meshnode.services.releases import ReleasesService
from meshnode.services.rollout.electorate import Electorate
from meshnode.services.rollout.service import RolloutService, RolloutSettings
from protocols.rollout.events import Pace


def learning_service(
    parts: Parts,
    config: Config,
    directory: DirectoryService,
    content: ContentService,
    membership: MembershipService,
    rights: Rights,
    attention: Attention,
    owner: Owner,
) -> LearningService:
    """`attention`: whether questions are answered here."""
    ground = Ground(
        us=parts.identity.peer_id,
        signer=parts.identity,
        notices=directory.notices,
        rights=rights,
        content=content,
        store=parts.store,
        workers=parts.workers,
        wall=parts.wall,
    )
    return LearningService(ground, membership, attention, _school(parts, config, owner), parts.health)


def rollout_service(
    parts: Parts,
    config: Config,
    directory: DirectoryService,
    membership: MembershipService,
    releases: ReleasesService,
    *,
    judge: Judge,
) -> RolloutService:
    """Raises DiskError when what was decided before can't be read."""
    pace = Pace(collect_s=config.release.collect, soak_s=config.release.soak)
    return RolloutService(
        directory.notices,
        Electorate(directory.notices, directory, membership, parts.health),
        releases,
        judge,
        parts.state,
        parts.health,
        RolloutSettings(us=parts.identity.peer_id, pace=pace),
    )


def _school(parts: Parts, config: Config, owner: Owner) -> School | None:
    """None: the owner has not asked for learning."""
    if parts.trainer is None:
        return None
    return School(
        folder=parts.learned,
        trainer=parts.trainer,
        samples=parts.samples,
        private=parts.private,
        rhythm=Rhythm(
            parts.activity,
            parts.rng,
            by_experience=config.learn.schedule == "experience",
            interval_s=60.0 * config.learn.interval,
            steps=config.learn.steps,
        ),
        permission=IdlePermission(parts.activity, idle_rule(config.learn), owner),
        owner=owner,
    )


def idle_rule(learn: LearnSection) -> IdleRule:
    """When the owner has this device train."""
    return IdleRule(
        battery_too=learn.power == "any",
        battery_floor_percent=learn.battery,
        load_percent=learn.load,
        owner_idle_s=60.0 * learn.owner_idle,
        hours=hours_of(learn.hours),
    )
