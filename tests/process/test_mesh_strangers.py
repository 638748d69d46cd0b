"""Who is not invited stays out, is told so in one sentence, and disturbs nobody."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from meshnode.api.messages import Status
from meshnode.cli.invite import make_ticket
from meshnode.harness.member import Member
from meshnode.harness.mesh import Mesh, free_ports
from tests.process.mesh_rig import READY_S, mesh_of, meshnode, small_model, tokens_of

pytestmark = [pytest.mark.net, pytest.mark.process]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Its files are for everybody, and nothing else is."""
    folder = tmp_path_factory.mktemp("members")
    settings = (("content.share", "anyone"),)
    with mesh_of(folder, 2, published=small_model(folder / "model"), settings=settings) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def usual(mesh: Mesh) -> list[int]:
    return tokens_of(mesh.members[0])


@pytest.fixture
def founder(mesh: Mesh, usual: list[int]) -> Iterator[Member]:
    """The node that is bothered; afterwards the mesh answers as before."""
    yield mesh.members[0]
    for member in mesh.members:
        assert member.status().ready
        assert tokens_of(member) == usual


def ticket_of(founder: Member) -> str:
    return make_ticket(founder.folder, uses=1, ttl_s=600, addresses=[founder.address])


def test_a_node_of_another_network(founder: Member, tmp_path: Path) -> None:
    with mesh_of(tmp_path, 1, settings=(("network.bootstrap", [founder.address]),)) as other:
        stranger = other.members[0]

        for member, peer in ((founder, stranger), (stranger, founder)):
            member.wait_for(partial(has_refusal, peer=peer.peer_id), READY_S, "a refusal")
            status = json.loads(meshnode("status", "--json", folder=member.folder).out)
            found = [refusal for refusal in status["refusals"] if refusal["peer"] == peer.peer_id]
            assert {refusal["code"] for refusal in found} == {"other-network"}
            assert all("another network" in refusal["text"] for refusal in found)
            assert all(row["peer"] != peer.peer_id for row in status["peers"])


def has_refusal(status: Status, **wanted: object) -> bool:
    return any(wanted.items() <= asdict(refusal).items() for refusal in status.refusals)


def test_a_ticket_for_one_device_used_by_two(founder: Member, tmp_path: Path) -> None:
    ticket = ticket_of(founder)
    assert meshnode("join", ticket, folder=tmp_path / "first").code == 0
    again = meshnode("join", ticket, folder=tmp_path / "first")
    assert again.code == 0, "the same device may redeem its ticket again: its first answer may have been lost"
    sentence = meshnode("join", ticket, folder=tmp_path / "second").sentence()
    assert "used" in sentence
    assert_not_let_in(tmp_path / "second")
    founder.wait_for(partial(has_refusal, code="invite-used"), READY_S, "a refusal")


def test_tampered_tickets(founder: Member, tmp_path: Path) -> None:
    ticket = ticket_of(founder)
    middle = len(ticket) // 2
    changed = ticket[:middle] + ("a" if ticket[middle] != "a" else "b") + ticket[middle + 1 :]
    for words in (changed, ticket[:-5]):
        ran = meshnode("join", words, folder=tmp_path / "data")
        assert "ticket" in ran.sentence(), ran.errors
        assert ran.out == ""
    assert meshnode("join", ticket, folder=tmp_path / "data").code == 0, "the failures used nothing up"


def test_nobody_at_the_address(founder: Member, tmp_path: Path) -> None:
    port = free_ports(1)[0]
    elsewhere = f"/ip4/127.0.0.1/tcp/{port}/p2p/{founder.peer_id}"
    ticket = make_ticket(founder.folder, uses=1, ttl_s=600, addresses=[elsewhere])
    sentence = meshnode("join", ticket, folder=tmp_path / "data").sentence()
    assert "can't be reached" in sentence
    assert str(port) in sentence


def assert_not_let_in(folder: Path) -> None:
    sentence = meshnode("start", folder=folder).sentence()
    assert "join" in sentence
