"""What a role gives, and what a member that lacks it can't do although it tries: whole nodes in virtual time."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
from trio.testing import MockClock

from meshnode.core.errors import Declined
from meshnode.membership.rights import Rights
from meshnode.services.inference.readiness import PROBE
from meshnode.sim.model import ModelSpec, make_model
from meshnode.sim.world import Device, World, give
from protocols.advert.messages import ADVERT, HEAD, SERVING, Advert, Announcement, Serving
from protocols.codec import encode
from protocols.ids import short
from protocols.membership import ROLES
from protocols.notice.messages import BALLOT, DELTA, Notice
from tests.sim.coverage import span_of

TOPIC = "/meshnode/records/{}"
NOWHERE = "bafyrei" + "a" * 52  # the CID of a manifest that nobody has


async def mesh(world: World, *roles: tuple[str, ...]) -> list[Device]:
    """A founder's device that serves the whole model alone, and members with these roles that have room for it."""
    world.add(memory="8MB")
    guests = [world.add(memory="8MB", roles=given, by="n1")[0] for given in roles]
    await world.start_all()
    await world.publish("n1")
    await world.until(lambda: world["n1"].running.readiness.now.ready)
    await world.until(world.connected)
    return guests


def codes(device: Device) -> dict[str, str]:
    return {shown.code: shown.text for shown in device.running.health.current()}


async def gossip(device: Device, domain: str, body: Advert | Announcement | Notice) -> None:
    """A record in the device's name, past everything that its own node checks."""
    node = device.running
    await node.host.publish(TOPIC.format(node.membership_file.network_id), device.identity.sign(domain, encode(body)))


async def test_who_asks_only_gets_answers_and_no_layers(world: World, autojump_clock: MockClock) -> None:
    (guest,) = await mesh(world, ("ask",))
    await world.until(world.all_ready)
    assert await world.ask(guest.name) == await world.ask("n1")
    assert span_of(guest) is None
    assert guest.running.directory.me().memory_bytes == 0
    assert "lacks the role serve" in codes(guest)["may-not-serve"]


async def test_the_role_serve_can_be_taken_and_given_while_it_serves(world: World, autojump_clock: MockClock) -> None:
    (guest,) = await mesh(world, ("serve",))
    await world.until(lambda: span_of(guest) is not None and world.all_ready())
    usual = await world.ask("n1")
    owner = world["n1"].running.membership
    await owner.withdraw(guest.peer_id, ("ask",), "too slow")
    await world.until(lambda: span_of(guest) is None and guest.running.directory.me().memory_bytes == 0, within_s=15)
    assert "lacks the role serve" in codes(guest)["may-not-serve"]
    await world.until(world.all_ready)
    assert await world.ask("n1") == await world.ask(guest.name) == usual
    seen = world["n1"].running.directory.live()[guest.peer_id]
    assert not seen.memory_bytes and "role-missing" not in codes(world["n1"]), "it obeys, so nobody is named"


async def test_who_serves_asks_too(world: World, autojump_clock: MockClock) -> None:
    (guest,) = await mesh(world, ("serve",))
    await world.until(lambda: span_of(guest) is not None and world.all_ready())
    assert await world.ask(guest.name) == await world.ask("n1")


async def test_who_does_not_ask_is_refused_on_its_own_device_and_on_others(
    world: World, autojump_clock: MockClock
) -> None:
    (guest,) = await mesh(world, ("publish",))
    with pytest.raises(Declined, match="This node may not ask questions: its certificate lacks the role ask"):
        await world.ask(guest.name)
    assert "role-missing" not in codes(world["n1"]), "nothing was sent"
    views = guest.running.directory.live
    await world.until(lambda: any(one.serving and one.serving.state == SERVING for one in views().values()))
    believes = Rights(lambda _: frozenset(ROLES), guest.running.health)
    with (
        patch.object(guest.running.origin, "_rights", believes),
        pytest.raises(Declined, match="lacks the role ask, says") as caught,
    ):
        async for _ in guest.running.origin.generate(PROBE):
            pass
    assert caught.value.code == "forbidden"
    assert "asks questions, but lacks the role ask" in codes(world["n1"])["role-missing"]


async def test_layers_of_who_may_not_serve_are_in_no_route_and_no_plan(
    world: World, autojump_clock: MockClock
) -> None:
    """It says that it serves everything, faster than anybody."""
    (guest,) = await mesh(world, ("ask",))
    owner = world["n1"].running
    release = owner.releases.current
    assert release is not None
    span = release.span((0, release.facts.layers))
    boast = replace(
        guest.running.directory.me(),
        sequence=1000,
        memory_bytes=1 << 40,
        layer_decode_us=1,
        serving=Serving(state=SERVING, span=span, target=None, decode_us=1, max_sessions=99),
    )
    await gossip(guest, ADVERT, boast)
    await world.until(lambda: "role-missing" in codes(world["n1"]))
    assert "says that it serves layers, but lacks the role serve" in codes(world["n1"])["role-missing"]
    seen = owner.directory.live()[guest.peer_id]
    assert (seen.memory_bytes, seen.serving) == (0, None)
    for seed in range(20):
        route = owner.origin._router.route(release, seed)
        assert [hop.peer for hop in route] == [owner.identity.peer_id]  # type: ignore[union-attr]
    assert await world.ask("n1")


async def test_who_may_not_publish_is_refused_on_its_own_device_and_its_word_elsewhere(
    world: World, autojump_clock: MockClock
) -> None:
    (guest,) = await mesh(world, ("serve",))
    with pytest.raises(Declined, match="lacks the role publish"):
        await world.publish(guest.name, ModelSpec(name="guests", layers=12))
    model = make_model(ModelSpec(name="guests", layers=12), guest.identity.signing_key, world.wall())
    assert guest.store is not None
    cid = give(guest.store, model, guest.folder)
    await gossip(guest, HEAD, announcement(guest, cid, world.wall() + 1000))
    await world.until(lambda: "role-missing" in codes(world["n1"]))
    assert "says which model the network serves, but lacks the role publish" in codes(world["n1"])["role-missing"]
    served = world["n1"].running.releases.current
    assert served is not None and served.manifest.name == "noise"


@pytest.mark.parametrize(("kind", "role"), [(DELTA, "train"), (BALLOT, "vote")])
async def test_what_was_learned_by_who_may_not_and_the_votes_of_who_may_not_count_nowhere(
    kind: str, role: str, world: World, autojump_clock: MockClock
) -> None:
    other = {"train": "vote", "vote": "train"}[role]
    (guest, member) = await mesh(world, ("serve", other), ("serve", role))
    with pytest.raises(Declined, match=f"lacks the role {role}"):
        guest.running.directory.notices.give(kind, b"mine")
    owner = world["n1"].running
    notice = Notice(peer=guest.peer_id, incarnation=world.wall(), sequence=1, kind=kind, content=b"mine")
    await gossip(guest, kind, notice)
    await world.until(lambda: "role-missing" in codes(world["n1"]))
    assert f"gives notice of a {kind}, but lacks the role {role}" in codes(world["n1"])["role-missing"]
    member.running.directory.notices.give(kind, b"ours")
    await world.until(lambda: bool(owner.directory.notices.all(kind)))
    assert owner.directory.notices.all(kind) == {member.peer_id: b"ours"}


async def test_those_who_overreach_are_named_a_few_at_a_time(world: World, autojump_clock: MockClock) -> None:
    guests = await mesh(world, *[("serve",)] * 12)

    def named(guest: Device) -> bool:
        shown = world["n1"].running.health.current()
        return any(entry.code == "role-missing" and short(guest.peer_id) in entry.text for entry in shown)

    node = world["n1"].running
    for guest in guests:  # nobody passes on what its signer may not say, and gossip reaches a few neighbours only
        record = guest.identity.sign(HEAD, encode(announcement(guest, NOWHERE, world.wall())))
        node.directory._book.take(guest.peer_id, record)
    assert sum(named(guest) for guest in guests) == 8


def announcement(device: Device, manifest: str, created_ms: int) -> Announcement:
    return Announcement(
        peer=device.peer_id,
        incarnation=created_ms,
        sequence=1,
        created_ms=created_ms,
        name="guests",
        version="v1.0.0-0",
        manifest=manifest,
        variant="int4",
    )
