"""Letting in, listing and putting out with the real command line, over real sockets."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshnode.api.messages import Status
from meshnode.core.paths import Paths
from meshnode.harness.member import Member
from meshnode.harness.mesh import Mesh, free_ports
from meshnode.membership.identity import Identity
from meshnode.services.inference.text import PATIENCE_S
from meshnode.state.database import Database
from tests.process.mesh_rig import READY_S, Ran, mesh_of, meshnode, small_model, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process]

OUT_S = 15.0


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("members")
    with mesh_of(folder, 2, published=small_model(folder / "model"), memory=("1GB",)) as mesh:
        yield mesh


@pytest.fixture
def owner(mesh: Mesh) -> Member:
    return mesh.members[0]


def invited(owner: Member, *flags: str) -> str:
    """The ticket that `meshnode invite` prints."""
    ran = meshnode("invite", *flags, folder=owner.folder)
    assert ran.code == 0, ran.errors
    return next(line.split()[-1] for line in ran.out.splitlines() if "meshnode join " in line)


def guest_of(ticket: str, folder: Path) -> Member:
    """A device that has joined, and has room for everything."""
    joined = meshnode("join", ticket, folder=folder)
    assert joined.code == 0, joined.errors
    (port,) = free_ports(1)
    peer = Identity.load(folder).peer_id
    guest = Member("guest", folder, peer, f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}")
    (Paths(folder).folder / "config.toml").write_text(
        f'[node]\nname = "guest"\n[network]\nlisten = ["/ip4/127.0.0.1/tcp/{port}"]\n'
        '[log]\nformat = "json"\n[serve]\nengine = "null"\nmemory = "1GB"\n'
    )
    return guest


def listed(member: Member) -> dict[str, dict[str, object]]:
    ran = meshnode("members", "--json", folder=member.folder)
    assert ran.code == 0, ran.errors
    return {entry["peer"]: entry for entry in json.loads(ran.out)}


def sees(peer: str) -> Callable[[Status], bool]:
    return lambda status: any(row.peer == peer and row.connected for row in status.peers)


@pytest.mark.long
def test_a_member_is_put_out_and_stays_out(mesh: Mesh, owner: Member, tmp_path: Path) -> None:
    usual = tokens_of(owner)
    ticket = invited(owner, "--uses", "0")
    guest = guest_of(ticket, tmp_path / "guest")
    guest.launch()
    try:
        guest.wait_answers()
        guest.wait_ready(READY_S)
        assert tokens_of(guest) == usual, "a plain ticket lets a device ask"
        for member in mesh.members:
            member.wait_for(sees(guest.peer_id), READY_S, "the guest")
        entry = listed(owner)[guest.peer_id]
        assert (entry["name"], entry["roles"], entry["founder"]) == ("guest", ["ask", "serve"], False)
        assert (entry["member"], entry["connected"], entry["invited_by"]) == (True, True, owner.peer_id)
        shown = meshnode("members", folder=owner.folder).out
        assert "guest" in shown and "ask, serve" in shown and "by node1" in shown

        refused = meshnode("model", "serve", "small-noise", folder=guest.folder)
        assert refused.code == 3 and "lacks the role publish" in refused.sentence(), refused.errors
        assert "lacks the role invite" in meshnode("members", "remove", "node1", folder=guest.folder).sentence()

        began = time.monotonic()
        invited(owner)
        ran = meshnode("members", "remove", "guest", "--reason", "it was sold", folder=owner.folder)
        assert ran.code == 0 and "is put out" in ran.out, ran.errors
        assert "2 tickets can still be used" in ran.out  # that, and the one of the harness
        for member in mesh.members:
            member.wait_for(lambda status: not sees(guest.peer_id)(status), OUT_S, "its end")
        assert time.monotonic() - began < OUT_S + READY_S
        assert "a new secret, which it does not get" in ran.out
        mesh.members[1].wait_for(lambda _: bool(secrets_of(mesh.members[1].folder)), OUT_S, "the new secret")
        assert not secrets_of(guest.folder)
        gone = listed(owner)[guest.peer_id]
        assert not gone["member"] and "it was sold" in str(gone["why_not"])
        for member in mesh.members:
            member.wait_for(lambda status: refusal_of(status, guest.peer_id), READY_S, "a refusal")
        told = guest.wait_for(lambda status: any(w.code == "put-out" for w in status.health), READY_S, "the word")
        (warning,) = (warning.text for warning in told.health if warning.code == "put-out")
        assert "it was sold" in warning and "meshnode join TICKET --anew" in warning, "its owner reads why"
        began = time.monotonic()
        asked = meshnode("generate", "--raw", "w1", folder=guest.folder)
        assert asked.code == 3 and "no member of the network any more" in asked.sentence(), asked.errors
        assert time.monotonic() - began < PATIENCE_S, "it does not wait for what can't come"
        looked = meshnode("doctor", folder=guest.folder)
        assert looked.code == 1 and "it was sold" in looked.out and "join TICKET --anew" in looked.out
        own = meshnode("members", folder=guest.folder).out
        assert "(you)" in own and "out: the membership of" in own and "--anew" in own
        again = meshnode("members", "remove", "guest", folder=owner.folder)
        assert again.code == 0 and "is out already" in again.out and "is put out" not in again.out
        assert not any(sees(guest.peer_id)(member.status()) for member in mesh.members)
    finally:
        guest.stop()
        guest.wait_stopped()
    ran = meshnode("start", folder=guest.folder)
    assert ran.code == 3 and "it was sold" in ran.sentence() and "--anew" in ran.sentence(), ran.errors
    kept = (guest.folder / "network" / "network.cbor").read_bytes()
    (guest.folder / "network" / "network.cbor").unlink()
    assert "no such invite" in meshnode("join", ticket, folder=guest.folder).sentence()
    other = meshnode("join", ticket, folder=tmp_path / "under another key")
    assert "no such invite" in other.sentence(), "what it has used lets in nobody else either"
    mesh.down()
    mesh.up()
    mesh.wait_ready(READY_S)
    assert tokens_of(owner) == usual
    assert not listed(mesh.members[1])[guest.peer_id]["member"]

    # Its owner has changed their mind.
    network = guest.folder / "network" / "network.cbor"
    network.write_bytes(kept)
    network.chmod(0o600)
    pardon = invited(owner)
    assert "join --anew" in meshnode("join", pardon, folder=guest.folder).out
    assert meshnode("join", pardon, "--anew", folder=guest.folder).code == 0
    guest.launch()
    try:
        guest.wait_answers()
        guest.wait_ready(READY_S)
        mesh.members[1].wait_for(sees(guest.peer_id), READY_S, "the guest")
    finally:
        guest.stop()
        guest.wait_stopped()


def secrets_of(folder: Path) -> dict[str, bytes]:
    """What came after the secret with which a node has joined."""
    with Database(Paths(folder).state) as state:
        return state.records("secret")


def test_a_new_device_comes_in_after_the_secret_was_renewed(mesh: Mesh, owner: Member, tmp_path: Path) -> None:
    ran = meshnode("members", "renew-secret", folder=owner.folder)
    assert ran.code == 0 and "told now" in ran.out, ran.errors
    late = guest_of(invited(owner), tmp_path / "late")
    late.launch()
    try:
        late.wait_answers()
        late.wait_ready(READY_S)
        for member in mesh.members:
            late.wait_for(sees(member.peer_id), READY_S, member.name)
    finally:
        late.stop()
        late.wait_stopped()
    refused = meshnode("members", "renew-secret", folder=late.folder).sentence()
    assert "only a founder's device" in refused


def test_a_node_and_the_founder_get_new_keys(mesh: Mesh, owner: Member) -> None:
    """The owner's device, whose word chooses the model: everybody goes on as before."""
    usual, other = tokens_of(owner), mesh.members[1]
    assert "Stop it first" in meshnode("members", "new-key", folder=owner.folder).sentence()
    owner.stop()
    owner.wait_stopped()
    for action in ("new-founder-key", "new-key"):
        ran = meshnode("members", action, folder=owner.folder)
        assert ran.code == 0, ran.errors
    before, after = owner.peer_id, Identity.load(owner.folder).peer_id
    assert before in ran.out and after in ran.out and before != after
    mesh.up()
    mesh.wait_ready(READY_S)
    other.wait_for(sees(after), READY_S, "the new key")
    assert tokens_of(owner) == tokens_of(other) == usual
    entries = listed(other)
    assert before not in entries and entries[after]["founder"]
    ran = meshnode("members", "remove", other.peer_id, "--keeps", "serve", folder=owner.folder)
    assert ran.code == 0, ran.errors
    other.wait_for(lambda status: "publish" not in status.me.roles, OUT_S, "the new founder's word")


def test_the_folder_is_taken_before_and_behind_the_action(owner: Member) -> None:
    lists = [
        meshnode("members", "--json", folder=owner.folder).out,
        meshnode("members", "list", "--json", folder=owner.folder).out,
        meshnode("members", "--data", owner.folder, "--json", "list").out,
        meshnode("members", "--data", owner.folder, "list", "--json").out,
    ]
    peers = [[entry["peer"] for entry in json.loads(text)] for text in lists]
    assert peers[0] and peers == peers[:1] * 4


def refusal_of(status: Status, peer: str) -> bool:
    return any(refusal.peer == peer and refusal.code == "forbidden" for refusal in status.refusals)


def test_tickets_are_listed_and_revoked(owner: Member, tmp_path: Path) -> None:
    ticket = invited(owner, "--roles", "ask,publish", "--uses", "3")
    lines = meshnode("invite", "--list", folder=owner.folder).out.splitlines()
    (line,) = [line for line in lines if "ask, publish" in line]
    assert "0 of 3 uses" in line and "until" in line
    name = line.split()[0]
    assert "no ticket" in meshnode("invite", "--revoke", "zzzz", folder=owner.folder).sentence()
    ran = meshnode("invite", "--revoke", name, folder=owner.folder)
    assert ran.code == 0 and name in ran.out
    assert "no such invite" in meshnode("join", ticket, folder=tmp_path / "late").sentence()
    (line,) = [line for line in meshnode("invite", "--list", folder=owner.folder).out.splitlines() if name in line]
    assert "revoked" in line


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("invite", "--roles", "king"), "'king' is no role; roles are ask, serve, publish, invite, train, vote"),
        (("invite", "--roles", ","), "names no role"),
        (("members", "remove", "nobody"), "no member 'nobody'"),
        (("members", "remove", "node1"), "this very node"),
    ],
)
def test_what_can_not_be_done(owner: Member, words: tuple[str, ...], hint: str) -> None:
    ran: Ran = meshnode(*words, folder=owner.folder)
    assert hint in ran.sentence()
