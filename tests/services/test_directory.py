from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.services.directory.author import next_incarnation
from meshnode.services.directory.publisher import COALESCE_S
from meshnode.services.directory.sync import (
    EXCHANGE_BURST,
    EXCHANGES_PER_S,
    MAX_STREAMS,
    SYNC_S,
    USELESS_BURST,
    USELESS_PER_S,
)
from meshnode.sim.network import MemoryHost
from meshnode.state.memory_state import MemoryState
from protocols.advert.leases import SUSPECT_S, lease_ms
from protocols.advert.messages import HEAD, RENEWALS, SERVING, Announcement, Holding, Serving, Span
from protocols.advert.validate import MAX_AHEAD_MS
from protocols.codec import decode, encode
from protocols.envelope import sign_record
from protocols.envelope.record import SignedRecord
from protocols.errors import LocalProtocolError
from protocols.frame import pack
from protocols.ids import RAW, Cid, cid_from_bytes, cid_of, cid_to_bytes, short
from protocols.membership import ROLES
from protocols.sync.messages import MAX_PAGE_RECORDS, PROTOCOL, SYNC, TIMEOUT_S, Digest, Item, Records
from tests.adverts import MANIFEST, OTHER_MANIFEST, advert_of, announcement_of, file_cid, key_of, peer_of, signed
from tests.services.directory_mesh import TOPIC, Mesh, Node, open_mesh


async def all_see(nodes: list[Node], within: float) -> None:
    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(node.sees_exactly, nodes, within)


async def five(mesh: Mesh, *, full: bool = False, within: float = 5) -> list[Node]:
    """Each connected with the next, or with each; all see all."""
    nodes = [await mesh.start(number) for number in range(1, 6)]
    await (mesh.full if full else mesh.line)(*nodes)
    await all_see(nodes, within)
    return nodes


async def never_changes_its_mind(node: Node, nodes: list[Node], seconds: float) -> None:
    """Whatever changes in the next seconds, the peers seen stay the same."""
    with trio.move_on_after(seconds):
        version = node.directory.changes.version
        while True:
            assert node.sees == sorted(n.peer for n in nodes)
            version = await node.directory.changes.wait(version)


@pytest.fixture
async def mesh(rng: random.Random) -> AsyncIterator[Mesh]:
    async with open_mesh(rng) as made:
        yield made


@pytest.fixture
async def pair(mesh: Mesh) -> tuple[Node, Node]:
    """Two nodes that see each other."""
    one, other = await mesh.start(1), await mesh.start(2)
    await mesh.line(one, other)
    await all_see([one, other], within=3)
    return one, other


async def test_five_nodes_in_a_line_agree(mesh: Mesh, autojump_clock: MockClock) -> None:
    nodes = await five(mesh)
    nodes[0].says(max_layers=7)
    for node in nodes:
        await node.until(lambda d: d.live()[nodes[0].peer].max_layers == 7, within=1)
    views = [{peer: replace(a, sequence=0) for peer, a in n.directory.live().items()} for n in nodes]
    assert all(view == views[0] for view in views)


async def test_loss_of_a_fifth_changes_nobody_s_mind(mesh: Mesh, autojump_clock: MockClock) -> None:
    mesh.network.set_gossip_loss(0.2)
    nodes = await five(mesh, full=True, within=15)
    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(never_changes_its_mind, node, nodes, 300)
    nodes[0].says(max_layers=7)
    for node in nodes:
        await node.until(lambda d: d.live()[nodes[0].peer].max_layers == 7, within=6)


async def test_a_partition_and_its_end(mesh: Mesh, autojump_clock: MockClock) -> None:
    nodes = await five(mesh, full=True)
    one, other = nodes[:3], nodes[3:]
    mesh.network.partition([n.peer for n in one], [n.peer for n in other])
    await all_see(one, within=3.5)
    await all_see(other, within=3.5)
    one[0].says(max_layers=7)
    await never_changes_its_mind(other[0], other, 60)
    mesh.network.heal()
    await mesh.line(one[0], other[0])
    await all_see(nodes, within=3)
    assert other[1].directory.live()[one[0].peer].max_layers == 7


async def test_a_late_joiner_knows_everybody_within_three_s(mesh: Mesh, autojump_clock: MockClock) -> None:
    nodes = await five(mesh)
    mesh.network.set_gossip_loss(1.0)  # only the direct stream can tell
    late = await mesh.start(6)
    await mesh.line(nodes[0], late)
    await late.sees_exactly([*nodes, late], within=3)


async def test_a_killed_neighbour_is_gone_after_three_s(mesh: Mesh, autojump_clock: MockClock) -> None:
    nodes = await five(mesh, full=True)
    await nodes[4].stop()
    assert nodes[4].peer in nodes[0].sees
    await all_see(nodes[:4], within=3.5)


async def test_a_distant_peer_is_gone_soon_since_its_neighbour_says_so(mesh: Mesh, autojump_clock: MockClock) -> None:
    nodes = await five(mesh)
    await trio.sleep(100)  # by now all have long leases
    await nodes[4].stop()
    await nodes[0].sees_exactly(nodes[:4], within=SUSPECT_S + 1.5)


async def test_whose_loss_is_told_although_it_lives_stays(mesh: Mesh, autojump_clock: MockClock) -> None:
    """One connection of several breaks: both ends tell, both speak up."""
    nodes = await five(mesh, full=True)
    await trio.sleep(100)
    mesh.network.partition([nodes[1].peer], [nodes[2].peer])
    await never_changes_its_mind(nodes[0], nodes, 30)


async def test_a_distant_peer_whose_loss_nobody_tells_is_gone_when_its_lease_ends(
    mesh: Mesh, autojump_clock: MockClock
) -> None:
    nodes = await five(mesh)
    await trio.sleep(100)
    await nodes[4].stop()
    mesh.network.set_gossip_loss(1.0)
    began = trio.current_time()
    lease_s = lease_ms(5) / 1000
    await nodes[0].sees_exactly(nodes[:4], within=lease_s + 0.5)
    assert trio.current_time() - began > lease_s * (1 - 1 / RENEWALS)
    assert nodes[0].directory.age_s(nodes[4].peer) == pytest.approx(lease_s, abs=0.5)


async def test_a_peer_that_others_still_hear_stays(mesh: Mesh, autojump_clock: MockClock) -> None:
    nodes = [await mesh.start(number) for number in (1, 2, 3)]
    await mesh.full(*nodes)
    await all_see(nodes, within=3)
    await nodes[0].host.disconnect(nodes[1].peer, "test")
    await never_changes_its_mind(nodes[0], nodes, 60)


async def test_news_of_a_lost_neighbour_is_asked_for(mesh: Mesh, autojump_clock: MockClock) -> None:
    one, two, three = nodes = [await mesh.start(number) for number in (1, 2, 3)]
    await mesh.full(*nodes)
    await all_see(nodes, within=3)
    mesh.network.set_gossip_loss(1.0)
    await one.host.disconnect(three.peer, "test")
    await two.host.disconnect(three.peer, "test")
    three.says(max_layers=7)
    with trio.move_on_after(3 * COALESCE_S):  # published, but nobody hears it
        await one.directory.changes.wait()
    await mesh.line(two, three)  # now they sync
    await two.until(lambda d: d.live()[three.peer].max_layers == 7, within=1.4)
    assert one.directory.live()[three.peer].max_layers == 0
    await one.until(lambda d: d.live()[three.peer].max_layers == 7, within=1.6)


async def test_what_gossip_lost_comes_by_the_next_sync(mesh: Mesh, autojump_clock: MockClock) -> None:
    one, other = await mesh.start(1, roles=["publish"]), await mesh.start(2)
    await mesh.line(one, other)
    await all_see([one, other], within=3)
    mesh.network.set_gossip_loss(1.0)
    head = one.directory.announce(name="m", version="v1.0.0-0", manifest=MANIFEST, variant="int4")
    await other.until(lambda d: d.announcement() == head, within=1.2 * SYNC_S + 1)


async def test_who_says_goodbye_is_gone_at_once(mesh: Mesh, autojump_clock: MockClock) -> None:
    nodes = await five(mesh)
    await nodes[4].directory.goodbye()
    for node in nodes[:4]:
        await node.sees_exactly(nodes[:4], within=0.2)
    assert nodes[4].sees == [n.peer for n in sorted(nodes[:4], key=lambda n: n.peer)]


async def test_a_restarted_node_takes_the_place_of_its_former_self(mesh: Mesh, autojump_clock: MockClock) -> None:
    one, other = await mesh.start(1), await mesh.start(2, max_layers=1)
    await mesh.line(one, other)
    await one.sees_exactly([one, other], within=3)
    before = one.directory.live()[other.peer]
    await other.stop()
    again = await mesh.start(2, max_layers=2)
    await mesh.line(one, again)
    await one.until(lambda d: d.live()[again.peer].max_layers == 2, within=3)
    after = one.directory.live()[again.peer]
    assert after.incarnation > before.incarnation
    hostile = await mesh.bare(9, one)
    await hostile.publish(TOPIC, signed(2, replace(before, sequence=999)))
    with trio.move_on_after(5):
        await one.directory.changes.wait()
    assert one.directory.live()[again.peer].incarnation == after.incarnation


async def test_a_replayed_advert_does_not_raise_the_dead(
    mesh: Mesh, pair: tuple[Node, Node], autojump_clock: MockClock
) -> None:
    one, other = pair
    last = signed(2, one.directory.live()[other.peer])
    hostile = await mesh.bare(9, one)
    await other.stop()
    await one.sees_exactly([one], within=13)
    for _ in range(20):
        await hostile.publish(TOPIC, last)
        with trio.move_on_after(1) as silence:
            await one.directory.changes.wait()
        assert silence.cancelled_caught
    assert one.sees == [one.peer]


async def test_forged_damaged_and_strange_records_have_no_effect(
    mesh: Mesh, pair: tuple[Node, Node], autojump_clock: MockClock
) -> None:
    one, other = pair
    hostile = await mesh.bare(9, one)
    before = replace(one.directory.live()[other.peer], sequence=0)
    newer = advert_of(2, incarnation=before.incarnation + 1, max_layers=99)
    for record in (
        b"",
        b"\xff" * 100,
        sign_record(key_of(9), "advert", encode(newer)),  # signed by another
        encode(replace(decode(SignedRecord, signed(2, newer)), signature=bytes(64))),
        encode(replace(decode(SignedRecord, signed(9, newer)), signer=bytes(key_of(2).verify_key))),
        signed(2, newer)[:-1],
        sign_record(key_of(2), "head", encode(newer)),  # another kind
        sign_record(key_of(2), "weather", encode(newer)),
        signed(2, replace(newer, addresses=("nonsense",))),
        signed(8, advert_of(8)),  # no certificate
        signed(9, announcement_of(9)),  # not a publisher
    ):
        await hostile.publish(TOPIC, record)
    await never_changes_its_mind(one, [one, other], 5)
    assert replace(one.directory.live()[other.peer], sequence=0) == before
    assert one.directory.announcement() is None
    assert other.sees == one.sees


async def test_two_nodes_with_one_key_are_noticed(mesh: Mesh, autojump_clock: MockClock) -> None:
    one, first = await mesh.start(1), await mesh.start(2)
    await mesh.line(one, first)
    await one.sees_exactly([one, first], within=3)
    hostile = await mesh.bare(9, one)
    seen = one.directory.live()[first.peer]
    future = replace(seen, sequence=seen.sequence + 1000, max_layers=63)
    await hostile.publish(TOPIC, signed(2, future))
    await hostile.publish(TOPIC, signed(2, replace(future, max_layers=64)))
    await one.sees_exactly([one], within=1)
    assert [w.code for w in one.health.current()] == ["two-writers"]
    # The owner of the key hears of it too.
    await first.until(lambda d: "two-writers" in [w.code for w in first.health.current()], within=1)
    await first.stop()
    again = await mesh.start(2)
    await mesh.line(one, again)
    await one.sees_exactly([one, again], within=3)


async def test_what_came_before_our_start_is_no_second_writer(
    mesh: Mesh, pair: tuple[Node, Node], autojump_clock: MockClock
) -> None:
    one, other = pair
    await other.stop()
    again = await mesh.start(2)
    await mesh.line(again, one)
    await again.sees_exactly([one, again], within=3)
    assert again.health.current() == []


async def test_heads_need_the_role_and_the_newest_counts(mesh: Mesh, autojump_clock: MockClock) -> None:
    one = await mesh.start(1, roles=["serve", "publish"], skew_ms=60_000)
    two = await mesh.start(2, roles=["publish"])
    three = await mesh.start(3)
    await mesh.line(one, two, three)
    await all_see([one, two, three], within=5)
    with pytest.raises(Declined, match="lacks the role publish"):
        three.directory.announce(name="m", version="v1.0.0-0", manifest=MANIFEST, variant="int4")
    first = one.directory.announce(name="m", version="v1.0.0-0", manifest=MANIFEST, variant="int4")
    await three.until(lambda d: d.announcement() == first, within=15)  # two may not gossip with three yet; it syncs
    second = two.directory.announce(name="m", version="v1.1.0-0", manifest=OTHER_MANIFEST, variant="int4")
    await three.until(lambda d: d.announcement() == second, within=1)
    await one.until(lambda d: d.announcement() == second, within=1)
    assert set(three.directory.announcements()) == {one.peer, two.peer}
    two.directory.announce(name="m", version="v1.1.0-0", manifest=OTHER_MANIFEST, variant="int4", retired=True)
    await three.until(lambda d: d.announcement() == first, within=1)
    mesh.members.grant(one.peer, ["serve"])  # the certificate was withdrawn
    await three.until(lambda d: d.announcement() is None, within=6)


async def test_a_head_outlives_restarts_and_reaches_who_comes_late(mesh: Mesh, autojump_clock: MockClock) -> None:
    publisher, keeper = await mesh.start(1, roles=["publish"]), await mesh.start(2)
    await mesh.line(publisher, keeper)
    head = publisher.directory.announce(name="m", version="v1.0.0-0", manifest=MANIFEST, variant="int4")
    await keeper.until(lambda d: d.announcement() == head, within=3)
    await publisher.stop()
    await keeper.stop()
    keeper = await mesh.start(2)
    assert keeper.directory.announcement() == head
    late = await mesh.start(3)
    await mesh.line(late, keeper)
    await late.until(lambda d: d.announcement() == head, within=3)
    publisher = await mesh.start(1, roles=["publish"])
    assert publisher.directory.announcement() == head
    newer = publisher.directory.announce(name="m", version="v1.0.1-0", manifest=MANIFEST, variant="int8")
    assert (newer.incarnation, newer.created_ms) > (head.incarnation, head.created_ms)
    await mesh.line(publisher, late)
    await late.until(lambda d: d.announcement() == newer, within=3)


def says(node: Node, manifest: str = MANIFEST, **more: Any) -> Announcement:
    return node.directory.announce(name="m", version="v1.0.0-0", manifest=Cid(manifest), variant="int4", **more)


async def test_a_founders_word_goes_before_a_members(mesh: Mesh, autojump_clock: MockClock) -> None:
    owner, guest = await mesh.start(1, roles=ROLES), await mesh.start(2, roles=["publish"], skew_ms=300_000)
    mesh.members.founders.add(owner.peer)
    await mesh.line(owner, guest)
    await all_see([owner, guest], within=5)
    first = says(guest, OTHER_MANIFEST)
    await owner.until(lambda d: d.announcement() == first, within=1)
    word = says(owner)
    assert word.created_ms < first.created_ms, "no date is needed to go first"
    await guest.until(lambda d: d.announcement() == word, within=1)
    with pytest.raises(
        Declined, match=f"by the word of {short(owner.peer)}, a founder's device.*meshnode model retract"
    ):
        says(guest, OTHER_MANIFEST)
    says(owner, retired=True)
    await guest.until(lambda d: d.announcement() == first, within=1)
    newer = says(guest)
    await owner.until(lambda d: d.announcement() == newer, within=1)


LAST = (1 << 63) - 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"created_ms": LAST},
        {"incarnation": LAST},
        {"incarnation": LAST, "sequence": LAST, "created_ms": LAST},
        {"sequence": LAST},
        {"created_ms": MAX_AHEAD_MS + 60_000},
        {"incarnation": MAX_AHEAD_MS + 60_000},
    ],
    ids=str,
)
@pytest.mark.parametrize("own_key", [False, True], ids=["another's", "the owner's, stolen"])
async def test_no_head_of_the_future_is_taken_and_the_owner_can_go_on(
    mesh: Mesh, autojump_clock: MockClock, wrong: dict[str, int], own_key: bool
) -> None:
    owner, other = await mesh.start(1, roles=["serve", "publish"]), await mesh.start(2)
    await mesh.line(owner, other)
    head = says(owner)
    await other.until(lambda d: d.announcement() == head, within=3)
    hostile = await mesh.bare(9, other)
    mesh.members.grant(hostile.peer_id, ["serve", "publish"])
    now = mesh.wall()
    usual = {"created_ms": now, "incarnation": now + 1, "sequence": 1}
    dated = {name: min(LAST, now + value) if name != "sequence" else value for name, value in wrong.items()}
    number = 1 if own_key else 9
    await hostile.publish(TOPIC, signed(number, announcement_of(number, manifest=OTHER_MANIFEST, **usual | dated)))
    await trio.sleep(3)
    assert other.directory.announcement() == head
    if "sequence" not in wrong:
        assert "dated-ahead" in [w.code for w in other.health.current()]
    newer = says(owner, OTHER_MANIFEST)
    await other.until(lambda d: d.announcement() == newer, within=3)


async def test_a_head_as_late_as_can_be_is_outbid_for_ever(mesh: Mesh, autojump_clock: MockClock) -> None:
    owner, other = await mesh.start(1, roles=["publish"]), await mesh.start(2)
    await mesh.line(owner, other)
    await all_see([owner, other], within=5)
    hostile = await mesh.bare(9, other)
    mesh.members.grant(hostile.peer_id, ["publish"])
    for number in range(5):
        at = mesh.wall() + MAX_AHEAD_MS
        bid = announcement_of(9, manifest=OTHER_MANIFEST, created_ms=at, incarnation=at, sequence=1)
        await hostile.publish(TOPIC, signed(9, bid))
        await other.until(lambda d, bid=bid: d.announcement() == bid, within=3)
        await owner.until(lambda d, bid=bid: d.announcement() == bid, within=3)
        await trio.sleep(number)
        word = says(owner)
        await other.until(lambda d, word=word: d.announcement() == word, within=3)


async def test_a_poisoned_store_is_healed_and_what_a_slow_clock_doubts_is_not_forgotten(
    mesh: Mesh, autojump_clock: MockClock
) -> None:
    owner = await mesh.start(1, roles=["publish"])
    head = says(owner)
    await owner.stop()
    mesh.members.grant(peer_of(9), ["publish"])
    poison = announcement_of(9, incarnation=LAST, sequence=1, created_ms=LAST, manifest=OTHER_MANIFEST)
    mesh.states[1].put_record(HEAD, peer_of(9), signed(9, poison))
    mesh.states[1].put_record(HEAD, peer_of(8), b"no record")
    again = await mesh.start(1, roles=["publish"])
    assert again.directory.announcement() == head
    newer = says(again)
    assert again.directory.announcement() == newer
    await again.stop()
    early = await mesh.start(1, roles=["publish"], skew_ms=-MAX_AHEAD_MS - 20_000)
    assert early.directory.announcement() is None, "its clock stands before the day on which that was written"
    await early.until(lambda d: d.announcement() == newer, within=30)


async def test_who_may_not_serve_holds_nothing_that_counts(mesh: Mesh, autojump_clock: MockClock) -> None:
    one = await mesh.start(1)
    cid = file_cid("layer")
    holds = Holding(manifest=MANIFEST, cids=(cid_to_bytes(cid),))
    span = Span(manifest=MANIFEST, variant="int4", first=0, last=4)
    boast: dict[str, Any] = {
        "memory_bytes": 5,
        "holdings": (holds,),
        "serving": Serving(state=SERVING, span=span, target=None),
    }
    guest = await mesh.start(2, roles=["ask"], **boast)
    await mesh.line(one, guest)
    await all_see([one, guest], within=5)
    for sees in (one, guest):
        seen = sees.directory.live()[guest.peer]
        assert (seen.memory_bytes, seen.serving, seen.holdings) == (0, None, ())
    assert one.directory.providers(cid) == []
    assert [w.code for w in one.health.current() if w.code == "role-missing"]
    mesh.members.grant(guest.peer, ["publish"])  # whoever publishes must be asked for its files
    await one.until(lambda d: d.live()[guest.peer].holdings, within=6)
    assert one.directory.live()[guest.peer].serving is None
    assert one.directory.providers(cid) == [guest.peer]
    mesh.members.grant(guest.peer, ["serve"])
    await one.until(lambda d: d.live()[guest.peer].serving, within=6)
    assert one.directory.live()[guest.peer].memory_bytes == 5


async def test_a_wrong_head_is_our_own_mistake(mesh: Mesh, autojump_clock: MockClock) -> None:
    one = await mesh.start(1, roles=["publish"])
    with pytest.raises(LocalProtocolError, match="no version"):
        one.directory.announce(name="m", version="1", manifest=MANIFEST, variant="int4")
    with pytest.raises(LocalProtocolError, match="no model name"):
        one.directory.announce(name="M", version="v1.0.0-0", manifest=MANIFEST, variant="int4")
    assert one.directory.announcements() == {}


async def test_many_changes_are_published_as_few_adverts(pair: tuple[Node, Node], autojump_clock: MockClock) -> None:
    one, other = pair
    await trio.testing.wait_all_tasks_blocked()
    before = other.directory.live()[one.peer].sequence
    began = trio.current_time()
    for max_layers in range(1, 21):
        one.says(max_layers=max_layers)
    assert one.directory.me().max_layers == one.directory.live()[one.peer].max_layers == 20
    await other.until(lambda d: d.live()[one.peer].max_layers == 20, within=0.2)
    assert other.directory.live()[one.peer].sequence <= before + 2
    version = one.directory.changes.version
    one.says(max_layers=20)
    assert one.directory.changes.version == version
    while trio.current_time() < began + 10:  # somebody who changes all the time
        one.says(max_layers=one.directory.me().max_layers + 1)
        with trio.move_on_after(0.1):
            await trio.sleep_forever()
    assert other.directory.live()[one.peer].sequence - before < 30


async def test_a_change_reaches_a_waiting_service_once(pair: tuple[Node, Node], autojump_clock: MockClock) -> None:
    one, other = pair
    version = one.directory.changes.version
    with trio.move_on_after(20):  # renewals alone wake nobody
        await one.directory.changes.wait(version)
    assert one.directory.changes.version == version
    other.says(max_layers=3)
    with trio.fail_after(1):
        assert await one.directory.changes.wait(version) == version + 1
        assert await one.directory.changes.wait(version) == version + 1  # nothing is missed


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "\x1b[2J"},
        {"addresses": ("nonsense",)},
        {"serving": Serving(state="serving", span=None, target=None)},
        {"sequence": 5},
        {"peer": str(peer_of(2))},
    ],
)
async def test_a_value_that_others_would_refuse_is_refused_here(
    mesh: Mesh, autojump_clock: MockClock, fields: dict[str, object]
) -> None:
    one = await mesh.start(1)
    before = one.directory.me()
    with pytest.raises(LocalProtocolError):
        one.says(**fields)
    assert replace(one.directory.me(), sequence=0) == replace(before, sequence=0)


async def test_providers_are_connected_peers_first(mesh: Mesh, autojump_clock: MockClock) -> None:
    wanted, other = file_cid("wanted"), file_cid("other")
    with_it = (Holding(manifest=MANIFEST, cids=tuple(sorted((cid_to_bytes(wanted), cid_to_bytes(other))))),)
    without = (Holding(manifest=MANIFEST, cids=(cid_to_bytes(other),)),)
    holdings = {1: with_it, 2: without, 3: with_it, 4: with_it, 5: with_it}
    nodes = [await mesh.start(n, holdings=holdings[n]) for n in holdings]
    await mesh.line(*nodes)
    await all_see(nodes, within=5)
    one, two, three, four, five_ = nodes
    assert one.directory.providers(wanted) == sorted([three.peer, four.peer, five_.peer])
    await one.host.connect(five_.peer, five_.host.addresses)
    assert one.directory.providers(wanted)[0] == five_.peer
    assert two.peer in one.directory.providers(other)
    assert one.peer not in one.directory.providers(wanted)
    assert one.directory.providers(file_cid("nobody's")) == []
    one.says(holdings=())
    await two.until(lambda d: one.peer not in d.providers(wanted), within=1)


async def test_more_holdings_than_a_record_takes_are_cut(pair: tuple[Node, Node], autojump_clock: MockClock) -> None:
    one, other = pair
    cids = sorted(cid_to_bytes(cid_of(RAW, b"%d" % i)) for i in range(3000))
    one.says(
        holdings=(
            Holding(manifest=MANIFEST, cids=tuple(cids[:1000])),
            Holding(manifest=OTHER_MANIFEST, cids=tuple(cids[1000:2000])),
            Holding(manifest=cid_from_bytes(b"\1\x71" + cids[0][2:]), cids=tuple(cids[2000:3000])),
        )
    )
    await other.until(lambda d: d.live()[one.peer].holdings, within=1)
    named = sum(len(holding.cids) for holding in other.directory.live()[one.peer].holdings)
    assert 750 <= named < 3000


async def test_a_wrong_clock_hurts_nobody(mesh: Mesh, autojump_clock: MockClock) -> None:
    nodes = [
        await mesh.start(1, skew_ms=-86_400_000),
        await mesh.start(2),
        await mesh.start(3, skew_ms=86_400_000),
    ]
    await mesh.line(*nodes)
    await all_see(nodes, within=5)
    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(never_changes_its_mind, node, nodes, 60)


async def test_a_certificate_that_comes_late_lets_the_advert_count(mesh: Mesh, autojump_clock: MockClock) -> None:
    one, other = await mesh.start(1), await mesh.start(2)
    mesh.members.grant(other.peer, [])
    await mesh.line(one, other)
    await never_changes_its_mind(one, [one], 5)
    mesh.members.grant(other.peer, ["serve"])
    await one.sees_exactly([one, other], within=0.5)
    mesh.members.roles.pop(other.peer)  # expired: nobody is told
    await one.sees_exactly([one], within=6)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 8,
        pack(b"nonsense"),
        pack(SYNC.encode(Records(items=()))),
        pack(SYNC.encode(Digest(held=())), b"body"),
        pack(SYNC.encode(Digest(held=(), more=True))),
    ],
)
async def test_nonsense_on_a_sync_stream_ends_the_stream_alone(
    mesh: Mesh, autojump_clock: MockClock, data: bytes
) -> None:
    one, other = await mesh.start(1), await mesh.start(2)
    await mesh.line(one, other)
    hostile = await mesh.bare(9, one)
    await one.sees_exactly([one, other], within=3)
    stream = await hostile.open_stream(one.peer, PROTOCOL)
    await stream.send_all(data)
    with trio.fail_after(5):
        with contextlib.suppress(PeerUnreachable):
            assert await stream.receive_some() == b""
    await never_changes_its_mind(one, [one, other], 15)


async def test_a_peer_that_says_nothing_is_not_waited_for(mesh: Mesh, autojump_clock: MockClock) -> None:
    one, other = await mesh.start(1), await mesh.start(2)
    hostile = await mesh.bare(9, one)
    streams = [await hostile.open_stream(one.peer, PROTOCOL) for _ in range(4)]
    for stream in streams[MAX_STREAMS:]:  # more than two at once are not even begun
        with trio.fail_after(0.1), pytest.raises(PeerUnreachable):
            await stream.receive_some()
    await mesh.line(other, one)
    await one.sees_exactly([one, other], within=3)
    for stream in streams[:MAX_STREAMS]:
        with trio.fail_after(TIMEOUT_S + 1), pytest.raises(PeerUnreachable):
            await stream.receive_some()


async def test_an_unsafe_record_in_a_sync_does_not_spoil_the_others(mesh: Mesh, autojump_clock: MockClock) -> None:
    one = await mesh.start(1)
    mesh.members.grant(peer_of(8), ["serve"])
    hostile = await mesh.bare(9, one)
    stream = await hostile.open_stream(one.peer, PROTOCOL)
    await stream.send_all(pack(SYNC.encode(Digest(held=()))))
    await stream.send_all(
        pack(SYNC.encode(Records(items=(Item(record=b"junk"), Item(record=signed(8, advert_of(8)))))))
    )
    await one.until(lambda d: peer_of(8) in d.live(), within=2)


async def exchange(hostile: MemoryHost, node: Node, records: Sequence[bytes]) -> float:
    """One that `hostile` begins, and in which it gives these; how long that took. Raises PeerUnreachable."""
    began = trio.current_time()
    stream = await hostile.open_stream(node.peer, PROTOCOL)
    await stream.send_all(pack(SYNC.encode(Digest(held=()))))
    pages = [records[at : at + MAX_PAGE_RECORDS] for at in range(0, len(records), MAX_PAGE_RECORDS)] or [()]
    for number, page in enumerate(pages):
        items = tuple(Item(record=record) for record in page)
        await stream.send_all(pack(SYNC.encode(Records(items=items, more=number < len(pages) - 1))))
    while await stream.receive_some():
        pass
    return trio.current_time() - began


async def test_exchanges_of_one_peer_have_a_rate(mesh: Mesh, autojump_clock: MockClock) -> None:
    one, more = await mesh.start(1), 10
    hostile, other = await mesh.bare(8, one), await mesh.bare(9, one)
    for _ in range(round(EXCHANGE_BURST) - 1):
        assert await exchange(hostile, one, ()) < 0.5
    took = [await exchange(hostile, one, ()) for _ in range(more)]
    assert sum(took) > (more - 2) / EXCHANGES_PER_S
    assert await exchange(other, one, ()) < 0.5, "nobody else waits for it"
    await trio.sleep(3 / EXCHANGES_PER_S)
    assert await exchange(hostile, one, ()) < 0.5, "and it is over when it has ceased"


async def test_records_that_are_no_news_are_taken_more_slowly(mesh: Mesh, autojump_clock: MockClock) -> None:
    one = await mesh.start(1)
    hostile, other = await mesh.bare(8, one), await mesh.bare(9, one)
    junk = [b"junk"] * (round(USELESS_BURST) - 50)
    assert await exchange(hostile, one, junk) < 1
    with pytest.raises(PeerUnreachable):  # it does not come to an end in its time
        await exchange(hostile, one, [b"junk"] * (50 + round(2 * TIMEOUT_S * USELESS_PER_S)))
    assert await exchange(other, one, junk) < 1, "nobody else waits for it"


async def test_who_comes_into_a_large_mesh_has_its_records_at_once(mesh: Mesh, autojump_clock: MockClock) -> None:
    """Those of members, of members whose certificates have not come yet, and all of them again."""
    one = await mesh.start(1)
    giver = await mesh.bare(9, one)
    numbers = range(100, 200)
    for number in numbers[:50]:
        mesh.members.grant(peer_of(number), ["serve"])
    records = [signed(number, advert_of(number)) for number in numbers]
    records += [signed(number, announcement_of(number)) for number in numbers]
    for _ in range(3):
        assert await exchange(giver, one, records) < 2
    assert {peer_of(number) for number in numbers[:50]} <= set(one.sees)


def test_an_incarnation_is_above_all_before_it() -> None:
    store = MemoryState()
    assert next_incarnation(store, peer_of(1), 1000) == 1000
    assert next_incarnation(store, peer_of(1), 500) == 1001
    assert next_incarnation(store, peer_of(1), 2000) == 2000
    assert next_incarnation(store, peer_of(2), 7) == 7
