from __future__ import annotations

from typing import Any

import pytest

from protocols.advert.leases import LEASE_S, SUSPECT_S, lease_ms
from protocols.advert.messages import (
    ADVERT,
    HEAD,
    LOSS,
    STATES,
    Advert,
    Announcement,
    Holding,
    Loss,
    RoundTrip,
    Serving,
    Span,
)
from protocols.advert.validate import MAX_AHEAD_MS, MAX_SEQUENCE, check_advert, check_announcement
from protocols.advert.view import LOSS_BURST, MAX_STRANGERS, RECORD_BURST, Outcome, View
from protocols.codec import encode
from protocols.envelope import open_record, sign_record
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, cid_to_bytes
from tests.adverts import (
    MANIFEST,
    NOW_MS,
    OTHER_MANIFEST,
    advert_of,
    announcement_of,
    file_cid,
    key_of,
    peer_of,
    signed,
)
from tests.vectors import Case, hold
from tests.wire import damaged

READER = peer_of(9)
SPAN = Span(manifest=MANIFEST, variant="int4", first=0, last=10)
CIDS = tuple(sorted(cid_to_bytes(file_cid(name)) for name in ("a", "b", "c")))
FULL = advert_of(
    1,
    addresses=(
        f"/ip4/192.0.2.1/tcp/4331/p2p/{peer_of(1)}",
        "/ip6/2001:db8::1/tcp/4331",
        "/dns4/node.example/tcp/1",
        f"/ip4/192.0.2.1/udp/4331/quic-v1/p2p/{peer_of(1)}",
    ),
    max_layers=2,
    memory_bytes=800_000_000,
    tags=("cpu", "mains"),
    serving=Serving(state="serving", span=SPAN, target=None, epoch=3, decode_us=4000),
    holdings=(Holding(manifest=MANIFEST, cids=CIDS), Holding(manifest=OTHER_MANIFEST, cids=())),
    round_trips=(RoundTrip(peer=peer_of(2), us=900),),
)


def serving(**fields: Any) -> Serving:
    return Serving(**{"state": "serving", "span": SPAN, "target": None, **fields})


def span(**fields: Any) -> Span:
    return Span(**{"manifest": MANIFEST, "variant": "int4", "first": 0, "last": 10, **fields})


BAD_ADVERTS: dict[str, dict[str, Any]] = {
    "of another peer": {"peer": peer_of(2)},
    "no incarnation": {"incarnation": 0},
    "a name with an escape code": {"name": "\x1b[31mred"},
    "a tag in capitals": {"tags": ("CPU",)},
    "an address without slashes": {"addresses": ("192.0.2.1:4331",)},
    "an address without a port": {"addresses": ("/ip4/192.0.2.1/tcp",)},
    "port 0": {"addresses": ("/ip4/192.0.2.1/tcp/0",)},
    "port 65536": {"addresses": ("/ip4/192.0.2.1/tcp/65536",)},
    "four numbers that are no address": {"addresses": ("/ip4/192.0.2.256/tcp/1",)},
    "an address of the other version": {"addresses": ("/ip4/2001:db8::1/tcp/1",)},
    "an address of another peer": {"addresses": (f"/ip4/192.0.2.1/tcp/1/p2p/{peer_of(2)}",)},
    "an address that is too long": {"addresses": ("/dns/" + "a" * 300 + "/tcp/1",)},
    "an address with a space": {"addresses": ("/dns/a b/tcp/1",)},
    "an unknown state": {"serving": serving(state="ready")},
    "serving nothing": {"serving": serving(span=None)},
    "loading nothing": {"serving": serving(state="loading")},
    "an intent without a target": {"serving": serving(state="intent")},
    "an empty span": {"serving": serving(span=span(first=10))},
    "a span backwards": {"serving": serving(target=span(first=11))},
    "a manifest that is a file": {"serving": serving(span=span(manifest=file_cid("a")))},
    "a manifest that is no CID": {"serving": serving(span=span(manifest="x" * 59))},
    "a variant with a slash": {"serving": serving(span=span(variant="../int4"))},
    "holdings of one manifest twice": {"holdings": (Holding(manifest=MANIFEST, cids=()),) * 2},
    "holdings in the wrong order": {"holdings": (Holding(manifest=MANIFEST, cids=CIDS[::-1]),)},
    "one file twice": {"holdings": (Holding(manifest=MANIFEST, cids=CIDS[:1] * 2),)},
    "a short CID": {"holdings": (Holding(manifest=MANIFEST, cids=(CIDS[0][:-1],)),)},
    "a CID with another hash": {"holdings": (Holding(manifest=MANIFEST, cids=(b"\1\x55\x11" + CIDS[0][3:],)),)},
    "holdings of no manifest": {"holdings": (Holding(manifest=file_cid("a"), cids=CIDS),)},
    "a round trip to itself": {"round_trips": (RoundTrip(peer=peer_of(1), us=1),)},
    "two round trips to one peer": {"round_trips": (RoundTrip(peer=peer_of(2), us=1),) * 2},
    "a round trip to nobody": {"round_trips": (RoundTrip(peer="nobody", us=1),)},
}
BAD_ANNOUNCEMENTS: dict[str, dict[str, Any]] = {
    "a head of another peer": {"peer": peer_of(2)},
    "a head without incarnation": {"incarnation": 0},
    "a head without a date": {"created_ms": 0},
    "a head with the last number there is": {"sequence": MAX_SEQUENCE + 1},
    "a head of the year 2024": {"created_ms": NOW_MS + MAX_AHEAD_MS + 1},
    "a head whose incarnation is of the year 2024": {"incarnation": NOW_MS + MAX_AHEAD_MS + 1},
    "a model name in capitals": {"name": "SmolLM2"},
    "a model name that leaves its folder": {"name": "../x"},
    "a version without a v": {"version": "1.0.0-0"},
    "a version with a leading zero": {"version": "v01.0.0-0"},
    "a head without manifest": {"manifest": ""},
    "a head whose manifest is a file": {"manifest": file_cid("a")},
    "a head without variant": {"variant": ""},
}


def members(peer: PeerId) -> frozenset[str]:
    return frozenset({"serve", "publish"})


def test_what_the_vectors_do_not_show_is_fine() -> None:
    check_announcement(announcement_of(1, version="v12.0.3"), peer_of(1))
    for state in STATES:
        check_advert(advert_of(1, serving=serving(state=state, target=SPAN)), peer_of(1))


def read(data: bytes) -> Advert | Announcement:
    """What a node believes of a record."""
    view = View(members)
    outcome, (domain, signer) = view.accept(data, 0.0, NOW_MS)
    entry = view.get(domain, signer)
    if outcome is not Outcome.CHANGED or entry is None:
        raise RemoteProtocolError(outcome.value)
    return entry.body


def test_vectors() -> None:
    good: list[Advert | Announcement] = [
        advert_of(1),
        FULL,
        advert_of(1, leaving=True),
        announcement_of(1),
        announcement_of(1, retired=True),
    ]
    names = ["the least", "everything", "goodbye", "a head", "a retired head"]
    bad = {
        **{name: advert_of(1, **fields) for name, fields in BAD_ADVERTS.items()},
        **{name: announcement_of(1, **fields) for name, fields in BAD_ANNOUNCEMENTS.items()},
    }
    hold(
        "advert",
        [
            *(Case(name, signed(1, body), body) for name, body in zip(names, good, strict=True)),
            *(Case(name, signed(1, body)) for name, body in bad.items()),
            Case("an advert in a head's domain", sign_record(key_of(1), HEAD, encode(FULL))),
            Case("an unknown domain", sign_record(key_of(1), "weather", encode(FULL))),
        ],
        read,
    )


def test_damage_is_refused() -> None:
    view = View(members)
    for data in damaged(signed(1, advert_of(1))):
        with pytest.raises(RemoteProtocolError):
            view.accept(data, 0.0, NOW_MS)
    for data in damaged(open_record(signed(1, advert_of(1))).payload):
        try:
            outcome, _ = view.accept(sign_record(key_of(1), ADVERT, data), 0.0, NOW_MS)
        except RemoteProtocolError:
            continue
        assert outcome in Outcome


def test_the_newer_record_wins_whatever_comes_first() -> None:
    view = View(members)
    first, second = signed(1, advert_of(1, max_layers=1)), signed(1, advert_of(1, sequence=2, max_layers=2))
    restarted = signed(1, advert_of(1, incarnation=2, sequence=0, max_layers=3))
    key = (ADVERT, peer_of(1))
    assert view.accept(second, 0.0, NOW_MS) == (Outcome.CHANGED, key)
    assert view.accept(first, 0.0, NOW_MS) == (Outcome.OLD, key)
    assert view.accept(second, 0.0, NOW_MS) == (Outcome.KNOWN, key)
    assert view.accept(restarted, 0.0, NOW_MS) == (Outcome.CHANGED, key)
    assert view.accept(signed(1, advert_of(1, sequence=9)), 0.0, NOW_MS) == (Outcome.OLD, key)
    assert view.accept(signed(1, advert_of(1, incarnation=2, max_layers=3)), 0.0, NOW_MS) == (Outcome.RENEWED, key)
    entry = view.alive(ADVERT, 0.0)[peer_of(1)]
    assert isinstance(entry.body, Advert)
    assert (entry.version, entry.body.max_layers) == ((2, 1), 3)


def test_a_lease_ends_and_an_old_advert_does_not_renew_it() -> None:
    view = View(members)
    view.accept(signed(1, advert_of(1)), 0.0, NOW_MS)
    view.accept(signed(1, advert_of(1)), 10.0, NOW_MS)
    assert list(view.alive(ADVERT, LEASE_S - 0.01)) == [peer_of(1)]
    assert not view.alive(ADVERT, LEASE_S)
    assert not view.shareable(LEASE_S, READER)
    assert view.versions() == {(ADVERT, peer_of(1)): (1, 1)}  # so that nobody sends it again
    assert view.accept(signed(1, advert_of(1)), 20.0, NOW_MS)[0] is Outcome.KNOWN
    assert not view.alive(ADVERT, 20.0)
    assert view.accept(signed(1, advert_of(1, sequence=2)), 20.0, NOW_MS)[0] is Outcome.CHANGED
    assert view.alive(ADVERT, 20.0)


def test_a_record_from_somebody_who_has_had_it_for_a_while_lasts_as_much_shorter() -> None:
    view = View(members)
    view.accept(signed(1, advert_of(1)), 100.0, NOW_MS, age_s=10.0)
    assert view.alive(ADVERT, 89.9 + LEASE_S)
    assert not view.alive(ADVERT, 90.0 + LEASE_S)
    assert view.accept(signed(2, advert_of(2)), 100.0, NOW_MS, age_s=LEASE_S)[0] is Outcome.IGNORED


def test_a_disconnected_peer_has_three_s() -> None:
    view = View(members)
    view.accept(signed(1, advert_of(1)), 0.0, NOW_MS)
    view.suspect(peer_of(1), 1.0)
    view.suspect(peer_of(2), 1.0)  # never heard of
    assert view.alive(ADVERT, 1.0 + SUSPECT_S - 0.01)
    assert not view.alive(ADVERT, 1.0 + SUSPECT_S)
    view.accept(signed(1, advert_of(1, sequence=2)), 3.0, NOW_MS)  # somebody else still hears it
    assert view.alive(ADVERT, 3.0 + LEASE_S - 0.01)


def test_who_leaves_is_gone_at_once_but_the_goodbye_is_passed_on() -> None:
    view = View(members)
    view.accept(signed(1, advert_of(1)), 0.0, NOW_MS)
    assert view.accept(signed(1, advert_of(1, sequence=2, leaving=True)), 1.0, NOW_MS)[0] is Outcome.CHANGED
    assert not view.alive(ADVERT, 1.0)
    assert view.shareable(1.0, READER)


def test_two_contents_under_one_number_end_the_belief_until_the_next_start() -> None:
    view = View(members)
    view.accept(signed(1, advert_of(1, max_layers=1)), 0.0, NOW_MS)
    view.accept(signed(1, announcement_of(1)), 0.0, NOW_MS)
    assert view.accept(signed(1, advert_of(1, max_layers=2)), 0.0, NOW_MS)[0] is Outcome.CONFLICT
    assert not view.alive(ADVERT, 0.0)
    assert list(view.shareable(0.0, READER)) == [(HEAD, peer_of(1))]
    assert view.accept(signed(1, advert_of(1, sequence=2)), 0.0, NOW_MS)[0] is Outcome.IGNORED
    assert view.accept(signed(1, advert_of(1, incarnation=2, max_layers=1)), 0.0, NOW_MS)[0] is Outcome.CHANGED
    assert view.alive(ADVERT, 0.0)
    assert view.alive(HEAD, 0.0)


def test_who_is_contested_does_not_count_and_everybody_is_told() -> None:
    view = View(members)
    view.accept(signed(1, advert_of(1)), 0.0, NOW_MS)
    assert view.accept(signed(1, advert_of(1, incarnation=2, contested=True)), 1.0, NOW_MS)[0] is Outcome.CHANGED
    assert not view.alive(ADVERT, 1.0)
    assert view.shareable(1.0, READER)
    assert view.accept(signed(1, advert_of(1, incarnation=3)), 2.0, NOW_MS)[0] is Outcome.CHANGED
    assert view.alive(ADVERT, 2.0)


def loss(witness: int, about: int, sequence: int = 1, **fields: Any) -> bytes:
    named = {"peer": peer_of(witness), "lost": peer_of(about), **fields}
    said = Loss(**named, incarnation=1, sequence=sequence)
    return sign_record(key_of(witness), LOSS, encode(said))


def test_a_loss_makes_the_lost_one_speak_up_or_go() -> None:
    view = View(members)
    view.accept(signed(1, advert_of(1, lease_ms=600_000)), 0.0, NOW_MS)
    key = (ADVERT, peer_of(1))
    assert view.accept(loss(2, 1), 50.0, NOW_MS) == (Outcome.SUSPECT, key)
    assert view.accept(loss(3, 1), 50.5, NOW_MS)[0] is Outcome.IGNORED, "one word is enough"
    assert view.alive(ADVERT, 50.0 + SUSPECT_S - 0.1)
    assert not view.alive(ADVERT, 50.0 + SUSPECT_S)
    view.accept(signed(1, advert_of(1, sequence=2, lease_ms=600_000)), 60.0, NOW_MS)
    assert view.alive(ADVERT, 600.0)


def test_what_a_loss_can_not_do() -> None:
    view = View(lambda peer: frozenset() if peer == peer_of(7) else members(peer))
    view.accept(signed(1, advert_of(1, sequence=5, lease_ms=600_000)), 0.0, NOW_MS)
    assert view.accept(loss(2, 1, sequence=4), 1.0, NOW_MS)[0] is Outcome.IGNORED, "something newer is known"
    assert view.accept(loss(7, 1, sequence=5), 1.0, NOW_MS)[0] is Outcome.IGNORED, "of a stranger"
    assert view.accept(loss(2, 3), 1.0, NOW_MS)[0] is Outcome.IGNORED, "of somebody unknown"
    for wrong in (loss(2, 2), loss(2, 1, peer=peer_of(3)), loss(2, 1, lost="nobody")):
        with pytest.raises(RemoteProtocolError):
            view.accept(wrong, 1.0, NOW_MS)
    assert view.accept(loss(2, 1, sequence=5), 2.0, NOW_MS)[0] is Outcome.SUSPECT
    for moment in (3, 5, 9):  # a flood of words costs the lost one a renewal in ten seconds
        view.accept(signed(1, advert_of(1, sequence=5 + moment, lease_ms=600_000)), float(moment), NOW_MS)
        assert view.accept(loss(3, 1, sequence=99), moment + 0.5, NOW_MS)[0] is Outcome.IGNORED
    assert view.versions().keys() == {(ADVERT, peer_of(1))}, "nobody keeps a loss"


@pytest.mark.parametrize("nodes, seconds", [(1, 16), (2, 16), (10, 80), (100, 800), (1024, 900)])
def test_leases_grow_with_the_mesh(nodes: int, seconds: int) -> None:
    assert lease_ms(nodes) == seconds * 1000
    view = View(members)
    view.accept(signed(1, advert_of(1, lease_ms=seconds * 1000)), 0.0, NOW_MS)
    assert view.alive(ADVERT, seconds - 0.1)
    assert not view.alive(ADVERT, float(seconds))


def test_another_lease_is_no_other_content() -> None:
    view = View(members)
    view.accept(signed(1, advert_of(1)), 0.0, NOW_MS)
    assert view.accept(signed(1, advert_of(1, sequence=2, lease_ms=40_000)), 1.0, NOW_MS)[0] is Outcome.RENEWED


def test_everybody_gets_what_was_signed_with_its_own_key_however_old_it_is() -> None:
    view = View(members)
    view.accept(signed(1, advert_of(1, incarnation=7)), 0.0, NOW_MS)
    late = 10 * LEASE_S
    assert not view.shareable(late, READER)
    ((record, age_s),) = view.shareable(late, peer_of(1)).values()
    true = View(members, peer_of(1))
    true.write(ADVERT, advert_of(1), encode(advert_of(1)), signed(1, advert_of(1)), late)
    true.accept(record, late, NOW_MS, age_s=age_s)
    entry = true.get(ADVERT, peer_of(1))
    assert entry is not None and entry.version == (7, 1)
    assert View(members, READER).accept(record, late, NOW_MS, age_s=age_s)[0] is Outcome.IGNORED


def test_heads_last_and_need_the_role() -> None:
    roles: dict[PeerId, frozenset[str]] = {peer_of(1): frozenset({"serve"})}
    view = View(roles.get)
    for number in (1, 2):
        assert view.accept(signed(number, announcement_of(number)), 0.0, NOW_MS)[0] is Outcome.STRANGER
    assert not view.alive(HEAD, 0.0)
    assert not view.shareable(0.0, READER)
    roles[peer_of(2)] = frozenset({"publish"})
    assert view.review(strangers_only=True)
    assert list(view.alive(HEAD, 1e9)) == [peer_of(2)]
    assert not view.review(strangers_only=False)
    roles.clear()
    assert not view.review(strangers_only=True)
    assert view.review(strangers_only=False)
    assert not view.alive(HEAD, 0.0)


def test_strangers_have_no_effect_and_little_room() -> None:
    view = View(lambda peer: None)
    for number in range(1, MAX_STRANGERS + 20):
        assert view.accept(signed(number, advert_of(number)), float(number), NOW_MS)[0] is Outcome.STRANGER
    assert len(view.versions()) == MAX_STRANGERS
    assert (ADVERT, peer_of(1)) not in view.versions()
    assert not view.alive(ADVERT, 1.0)


def test_two_contents_of_no_member_leave_no_trace() -> None:
    view = View(lambda _: frozenset())
    for number in range(1, 50):
        for name in ("a", "b", "c"):
            outcome, _ = view.accept(signed(number, advert_of(number, name=name)), 0.0, NOW_MS)
            assert outcome in (Outcome.STRANGER, Outcome.IGNORED)
    assert len(view.versions()) <= 49
    assert not view.shareable(0.0, READER)


def test_of_who_writes_too_fast_no_signature_is_checked() -> None:
    view = View(members)
    outcomes = [view.accept(signed(1, advert_of(1, sequence=n + 1)), 0.0, NOW_MS)[0] for n in range(50)]
    taken = round(RECORD_BURST)
    assert set(outcomes[:taken]) == {Outcome.CHANGED, Outcome.RENEWED}
    assert set(outcomes[taken:]) == {Outcome.TOO_FAST}
    forged = sign_record(key_of(2), ADVERT, encode(advert_of(1, sequence=99)))
    in_its_name = forged.replace(bytes(key_of(2).verify_key), bytes(key_of(1).verify_key))
    assert in_its_name != forged
    assert view.accept(in_its_name, 0.0, NOW_MS)[0] is Outcome.TOO_FAST
    with pytest.raises(RemoteProtocolError, match="signature"):
        view.accept(in_its_name, 1.0, NOW_MS)
    assert view.accept(signed(1, advert_of(1, sequence=100)), 1.0, NOW_MS)[0] is Outcome.RENEWED, "it is over again"


def test_what_others_forge_makes_nobody_too_fast() -> None:
    view = View(members)
    for number in range(100):
        forged = sign_record(key_of(2), ADVERT, encode(advert_of(1, sequence=number + 1)))
        with pytest.raises(RemoteProtocolError, match="signature"):
            view.accept(forged.replace(bytes(key_of(2).verify_key), bytes(key_of(1).verify_key)), 0.0, NOW_MS)
    assert view.accept(signed(1, advert_of(1)), 0.0, NOW_MS)[0] is Outcome.CHANGED


def test_each_kind_of_record_has_a_rate_of_its_own_and_losses_have_room_for_half_a_mesh() -> None:
    view = View(members)
    view.accept(signed(1, advert_of(1)), 0.0, NOW_MS)
    losses = [view.accept(loss(2, 1, sequence=n + 1), 0.0, NOW_MS)[0] for n in range(round(LOSS_BURST) + 10)]
    assert Outcome.TOO_FAST not in losses[: round(LOSS_BURST)]
    assert set(losses[round(LOSS_BURST) :]) == {Outcome.TOO_FAST}
    assert view.accept(signed(2, advert_of(2)), 0.0, NOW_MS)[0] is Outcome.CHANGED
