"""What is fuzzed: for each reader of bytes from outside, inputs to begin with and what takes an injured one.

What the product documents for bad input may be raised, a `MeshError`. Where a signature, a checksum or a seal would
refuse everything, it is made anew over the injured content, as a hostile member would.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import random
import re
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from nacl.signing import SigningKey

from protocols import dag_cbor, multiaddr
from protocols.adapter.manifest import decode_adapter, encode_adapter
from protocols.advert.messages import ADVERT, HEAD, Advert, Announcement, Span
from protocols.advert.view import View
from protocols.bitswap import client as bitswap_client
from protocols.bitswap import messages as bitswap
from protocols.bitswap.server import Server
from protocols.car.machine import Reader
from protocols.codec import Union, decode, encode, loads
from protocols.cohort.events import Begin, Fetched, Heard, Mask, Stored
from protocols.cohort.messages import COHORT_RECORD, Word, open_word
from protocols.delta.checks import Expected, judge_age, judge_record
from protocols.delta.codec import pack_delta, unpack_delta
from protocols.delta.frame import decode_frame, encode_frame
from protocols.delta.lineage import Lineage
from protocols.delta.messages import DELTA_RECORD, Codec, open_delta, prove, record_cid
from protocols.enginewire.machine import EngineSide, NodeSide
from protocols.enginewire.messages import ANSWERS, REQUESTS, Step, Stepped
from protocols.envelope import open_record, sign_record
from protocols.errors import LocalProtocolError, MeshError, RemoteProtocolError
from protocols.frame import FrameReader, pack
from protocols.ids import (
    DAG_CBOR,
    RAW,
    base58_decode,
    cid_from_bytes,
    cid_of,
    cid_of_old,
    cid_to_bytes,
    peer_id_of,
    public_key_of,
)
from protocols.intent.machine import Keeper, Standing
from protocols.intent.messages import HOLDS, Hold
from protocols.kad import lookup as kad_lookup
from protocols.kad import messages as kad
from protocols.manifest import codec as manifest
from protocols.mdns import dns
from protocols.mdns.machine import Discovery
from protocols.mdns.messages import KEYS, NONCE_BYTES, PLAIN_BYTES, SERVICE, STRING_BYTES, Hint, Seal
from protocols.membership import HELLO, HelloMachine, describe, format_ticket, open_network, parse_ticket
from protocols.membership import machine as hello
from protocols.membership.messages import Certificate, Network, Renewal, Succession, Withdrawal
from protocols.membership.renewal import open_renewal
from protocols.membership.ticket import PREFIX, Ticket, _checksum
from protocols.pipe import origin as pipe
from protocols.pipe.messages import PIPE, Close, HopTime, Open, Opened, Pooled, Refused, Token
from protocols.pipe.messages import Step as PipeStep
from protocols.pipe.stage import Ran, StageSession
from protocols.sync.machine import SyncMachine
from protocols.sync.messages import SYNC
from protocols.unixfs import node as unixfs
from protocols.unixfs.assembly import Assembly
from tests.cohorts import NAMES, Table
from tests.deltas import FRAME, key_of, peer_of
from tests.deltas import record as delta_record
from tests.fuzz.mutate import injured, message_of, odd_cbor, odd_json
from tests.vectors import PROTOCOLS

Injure = Callable[[bytes, random.Random], bytes]
Take = Callable[[bytes], object]

NOW_MS: Final = 1_700_000_000_000
KEY: Final = SigningKey(bytes(range(32)))
PEER: Final = peer_id_of(bytes(KEY.verify_key))


@dataclass(frozen=True, slots=True)
class Ready:
    """A target that can be run. `take` gives something true when the input was taken, and raises `MeshError`."""

    seeds: list[bytes]
    take: Take
    fresh: Callable[[random.Random], bytes] | None = None  # another valid input
    injure: tuple[Injure, ...] = (injured,)


@dataclass(frozen=True, slots=True)
class Target:
    """`make` gets an empty folder. `share` of the inputs of a run, relative to the others."""

    make: Callable[[Path], Ready]
    share: int = 100
    needs: tuple[str, ...] = field(default=())  # packages of the publisher


TARGETS: Final[dict[str, Target]] = {}


def target(name: str, share: int = 100, needs: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    def add(make: Callable[[Path], Ready]) -> Callable[[Path], Ready]:
        TARGETS[name] = Target(make, share, needs)
        return make

    return add


def vectors(protocol: str) -> list[bytes]:
    """The bytes of all its vectors, those that are refused as well."""
    return [bytes.fromhex(entry["hex"]) for entry in json.loads((PROTOCOLS / protocol / "vectors.json").read_text())]


def pieces(data: bytes) -> Iterable[bytes]:
    """As a stream may bring them; where they are cut follows from the bytes."""
    size = max(1 + (data[-1] if data else 0) * 7, len(data) // 64)
    return (data[at : at + size] for at in range(0, len(data), size))


def framed(union: Union[Any], most: int = 6) -> Callable[[random.Random], bytes]:
    """Frames with random messages of a protocol."""
    classes = list(union)

    def fresh(chance: random.Random) -> bytes:
        found = []
        for _ in range(chance.randint(1, most)):
            with suppress(LocalProtocolError):  # a message above the limit of its protocol
                found.append(
                    pack(
                        union.encode(message_of(chance.choice(classes), chance)),
                        chance.randbytes(chance.choice((0, 0, 4, 128))),
                    )
                )
        return b"".join(found)

    return fresh


def messages_in(data: bytes, *unions: Union[Any]) -> Iterable[tuple[Any, bytes]]:
    """The messages in a stream of frames, with their bodies. Raises RemoteProtocolError like a node's reader."""
    reader = FrameReader(max_header=1 << 18, max_body=1 << 20)
    for piece in pieces(data):
        for frame in reader.feed(piece):
            for union in unions:
                yield union.decode(frame.header), frame.body


def one_message(union: Union[Any]) -> Callable[[random.Random], bytes]:
    classes = list(union)
    return lambda chance: union.encode(message_of(chance.choice(classes), chance))


def each(union: Union[Any], protocol: str) -> Ready:
    """Single messages of a protocol. What is taken has one encoding, but for keys that are not known."""

    def take(data: bytes) -> bool:
        message = union.decode(data)
        again = union.encode(message)
        assert again == data or len(again) < len(data)
        return True

    return Ready(vectors(protocol), take, one_message(union), (odd_cbor, injured))


# ---------------------------------------------------------------- the pieces of every protocol


@target("cbor", 40)
def _cbor(_folder: Path) -> Ready:
    def take(data: bytes) -> bool:
        loads(data)
        for cls in (Advert, Announcement, Network, Certificate, Withdrawal, Succession, Renewal, Ticket, Hint, Span):
            with suppress(RemoteProtocolError):
                decode(cls, data)
        return True

    seeds = [data for name in ("pipe", "sync", "intent", "enginewire", "envelope") for data in vectors(name)]
    return Ready(
        seeds,
        take,
        lambda chance: encode(message_of(chance.choice((Advert, Network, Renewal)), chance)),
        (odd_cbor, injured),
    )


@target("frame")
def _frame(_folder: Path) -> Ready:
    def take(data: bytes) -> bool:
        reader = FrameReader(max_header=1 << 10, max_body=1 << 12)
        for piece in pieces(data):
            for _ in reader.feed(piece):
                pass
            assert reader.pending <= (1 << 13) + len(piece)
        return not reader.pending

    return Ready([b"".join(pack(data) for data in vectors("pipe")[:6])], take, framed(PIPE))


@target("names", 100)
def _names(_folder: Path) -> Ready:
    """CIDs, peer ids and addresses as text."""
    readers = (cid_to_bytes, cid_of_old, base58_decode, public_key_of, multiaddr.parse_address)

    def take(data: bytes) -> bool:
        text, good = data.decode("utf-8", "surrogateescape"), 0
        for read in readers:
            with suppress(RemoteProtocolError):
                read(text)
                good += 1
        with suppress(RemoteProtocolError):
            cid_from_bytes(data)
        return good > 0

    addresses = (
        "/ip4/192.0.2.1/tcp/4331",
        f"/ip6/2001:db8::1/tcp/1/p2p/{PEER}",
        f"/dns4/a.example/tcp/65535/p2p/{PEER}",
    )
    texts = (
        *addresses,
        PEER,
        cid_of(RAW, b"a"),
        cid_of(DAG_CBOR, b"b"),
        "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG",
    )
    return Ready([text.encode() for text in texts], take)


@target("swarm key", 50)
def _swarm_key(_folder: Path) -> Ready:
    from meshnode.net.swarm_key import GREETING, Cover, parse_swarm_key

    cover = Cover(bytes(32))

    def take(data: bytes) -> bool:
        other = Cover(bytes(32))
        for piece in pieces(data):
            other.open(piece)
        with suppress(ValueError):  # what load_swarm_key turns into a ConfigError
            return len(parse_swarm_key(data)) == 32
        return True

    texts = [b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"ab" * 32, b"/key/swarm/psk/1.0.0/\n/bin/\n" + bytes(32)]
    return Ready([*texts, cover.seal(GREETING + b"more of it")], take)


# ---------------------------------------------------------------- records of members


@target("envelope", 60)
def _envelope(_folder: Path) -> Ready:
    return Ready(vectors("envelope"), lambda data: open_record(data), None, (odd_cbor, injured))


@target("advert", 15)
def _advert(_folder: Path) -> Ready:
    """The payload of a record, signed by a member; a view of the mesh takes it."""
    state = {"view": View(lambda peer: frozenset(("serve", "publish"))), "count": 0}

    def take(data: bytes) -> bool:
        state["count"] += 1
        if state["count"] % 1000 == 0:
            state["view"] = View(lambda peer: frozenset(("serve", "publish")))
        view = state["view"]
        for domain in (ADVERT, HEAD):
            with suppress(RemoteProtocolError):
                view.accept(sign_record(KEY, domain, data[: 1 << 15]), state["count"] / 100, NOW_MS)
        if state["count"] % 50 == 0:
            view.alive(ADVERT, state["count"] / 100)
            view.shareable(state["count"] / 100, PEER)
            view.versions()
        return False

    def fresh(chance: random.Random) -> bytes:
        message = message_of(chance.choice((Advert, Announcement)), chance)
        return encode(dataclasses.replace(message, peer=PEER, incarnation=chance.choice((1, NOW_MS, (1 << 63) - 1))))

    payloads = []
    for data in vectors("advert"):
        with suppress(RemoteProtocolError):
            payloads.append(open_record(data).payload)
    return Ready(payloads, take, fresh, (odd_cbor, injured))


@target("rollout", 15)
def _rollout(_folder: Path) -> Ready:
    """The content of a notice about roll-outs, beside honest ones; a count and a machine take it."""
    from protocols.rollout import messages as rollout
    from protocols.rollout.events import Heard
    from tests.rollouts import Town, candidate_of, vote_of

    kinds = (rollout.Candidates, rollout.Ballots, rollout.Tallies, rollout.Revocations)
    honest = candidate_of("honest")

    def take(data: bytes) -> bool:
        town = Town(("a", "b", "c", "d"))
        town.propose(honest)
        town.vote("abc", vote_of(honest, -0.02))
        taken = False
        for kind in kinds:
            with suppress(RemoteProtocolError):
                content = decode(kind, data)
                rollout.check_content(content, PEER)
                assert encode(content) == data or len(encode(content)) < len(data)
                town.said["d", kind] = content
                taken = True
        town.handle(Heard(town.count()))
        town.pass_time(1e5)
        assert town.machine.head == honest
        return taken

    def fresh(chance: random.Random) -> bytes:
        return encode(message_of(chance.choice(kinds), chance))

    return Ready(vectors("rollout"), take, fresh, (odd_cbor, injured))


@target("trust", 4)
def _trust(_folder: Path) -> Ready:
    """Certificates, withdrawals, successions, renewals and networks, signed by a founder and by a member."""
    from protocols.membership import Trust
    from tests.unit.membership_actors import World, key_of, peer_of_key

    world, founder, ann = World(), key_of("founder"), key_of("ann")
    chain, network = world.chain("ann"), world.trust().id
    kinds = {Certificate: "member", Withdrawal: "withdrawal", Succession: "succession", Renewal: "renewal"}
    domains = {
        open_record(chain[0]).domain,
        open_record(world.withdrawal("ann", by="founder")).domain,
        *kinds.values(),
    }

    def take(data: bytes) -> bool:
        for key, before in ((founder, ()), (ann, chain)):
            for domain in domains:
                record = sign_record(key, domain, data[: 1 << 15])
                trust = Trust(world.network)
                with suppress(MeshError):
                    trust.check((*before, record), NOW_MS)
                with suppress(MeshError):
                    trust.withdraw(record, NOW_MS)
                with suppress(MeshError):
                    open_renewal(record, world.secret, trust, NOW_MS)
        with suppress(MeshError):
            open_network(sign_record(founder, "network", data[: 1 << 15]))
        return False

    def fresh(chance: random.Random) -> bytes:
        message = message_of(chance.choice((*kinds, Network)), chance)
        if isinstance(message, Network):
            return encode(message)
        changes: dict[str, Any] = {"network": network, "issued_ms": chance.choice((0, NOW_MS, (1 << 63) - 1))}
        if isinstance(message, (Certificate, Withdrawal)):
            changes["peer"] = chance.choice((peer_of_key("ann"), peer_of_key("bob"), peer_of_key("founder")))
        if isinstance(message, Succession):
            changes["successor"] = peer_of_key("bob")
        if isinstance(message, (Withdrawal, Renewal)):
            changes["chain"] = chance.choice(((), chain))
        return encode(dataclasses.replace(message, **changes))

    seeds = [
        open_record(record).payload
        for record in (*world.chain("ann", "bob"), world.withdrawal("ann", by="founder"), world.network_record)
    ]
    return Ready(seeds, take, fresh, (odd_cbor, injured))


@target("pairing", 2, needs=("spake2",))
def _pairing(_folder: Path) -> Ready:
    """Frames for both sides of a pairing, in any order."""
    from protocols.pairing.exchange import Exchange
    from protocols.pairing.machine import Begin, Deny, Joiner, Judged, Opener
    from protocols.pairing.messages import PAIRING, WRONG_PIN, Ask, Share

    bob = peer_of("bob")

    def sides() -> tuple[Opener, Joiner]:
        chance = random.Random(1).randbytes
        opener = Opener("123456", us=PEER, joiner=bob, now=0.0, random_bytes=chance)
        joiner = Joiner("123456", us=bob, opener=PEER, name="kitchen", now=0.0, random_bytes=chance)
        joiner.handle(Begin(), 0.0)
        return opener, joiner

    def take(data: bytes) -> bool:
        taken = 0
        for side in sides():
            with suppress(RemoteProtocolError):
                for message, _body in messages_in(data, PAIRING):
                    effects = side.handle(message, 0.0)
                    taken += 1
                    if effects and isinstance(effects[0], Judged):
                        assert not effects[0].right, "somebody has guessed 256 bits"
                        side.handle(Deny(WRONG_PIN, "no"), 0.0)
        return taken > 0

    proof, refused = vectors("pairing")[2], vectors("pairing")[4]
    shares = [
        Exchange("123456", joiner=bob, opener=PEER, joins=joins, random_bytes=random.Random(2).randbytes).share
        for joins in (True, False)
    ]
    first = [PAIRING.encode(Ask(share=shares[0], name="kitchen")), PAIRING.encode(Share(share=shares[1]))]
    seeds = [b"".join(pack(data) for data in words) for words in ((first[0], proof), (first[1], refused))]
    return Ready(seeds, take, framed(PAIRING))


@target("hello", 50)
def _hello(_folder: Path) -> Ready:
    from tests.unit.membership_actors import World

    world = World()
    ann, bob = world.credentials("ann"), world.credentials("ann", "bob")
    starts = (None, hello.Begin(), hello.BeginJoin(message_of(hello.Join, random.Random(1))))

    def machine_of() -> HelloMachine:
        return HelloMachine(theirs=bob.peer, credentials=ann, trust=world.trust(), nonce=b"n" * 16, now=0.0)

    def take(data: bytes) -> bool:
        machine, start = machine_of(), starts[len(data) % 3]
        if start is not None:
            machine.handle(start, 0.0, NOW_MS)
        for message, _ in messages_in(data, HELLO):
            for effect in machine.handle(message, 0.0, NOW_MS):
                assert not isinstance(effect, (hello.Trusted, hello.MutuallyAdmitted))
        return True

    theirs = HelloMachine(theirs=ann.peer, credentials=bob, trust=world.trust(), nonce=b"x" * 16, now=0.0)
    (greeting,) = theirs.handle(hello.Begin(), 0.0, NOW_MS)
    seeds = [pack(data) for data in vectors("membership")] + [pack(HELLO.encode(greeting.message))]
    return Ready(seeds, take, framed(HELLO))


@target("hello messages", 150)
def _hello_messages(_folder: Path) -> Ready:
    return each(HELLO, "membership")


@target("ticket", 6)
def _ticket(_folder: Path) -> Ready:
    """Pasted text with a ticket in it."""
    from tests.unit.test_membership_ticket import COPIED

    def take(data: bytes) -> bool:
        describe(parse_ticket(data.decode("utf-8", "replace")[: 1 << 16]), NOW_MS)
        return True

    return Ready([text.encode("utf-8", "replace") for text in COPIED.values()], take)


@target("ticket content", 40)
def _ticket_content(_folder: Path) -> Ready:
    """What a ticket says, under a checksum that is right."""
    from tests.unit.test_membership_ticket import TICKET

    def take(data: bytes) -> bool:
        text = PREFIX + base64.b32encode(data + _checksum(data)).decode().lower().rstrip("=")
        ticket = parse_ticket(text[: 1 << 16])
        describe(ticket, NOW_MS)
        ticket.peers()
        return format_ticket(ticket) == text

    return Ready(
        [encode(TICKET)],
        take,
        lambda chance: encode(dataclasses.replace(message_of(Ticket, chance), issuer=PEER)),
        (odd_cbor, injured),
    )


# ---------------------------------------------------------------- protocols between nodes


@target("sync", 30)
def _sync(_folder: Path) -> Ready:
    held = {(domain, peer_id_of(bytes([i]) * 32)): (i, i) for i in range(1, 6) for domain in (ADVERT, HEAD)}
    given = dict.fromkeys(held, (b"a record", 1.0))

    def take(data: bytes) -> bool:
        machine = SyncMachine(held, given, asking=bool(len(data) % 2))
        if len(data) % 2:
            machine.begin()
        for message, _ in messages_in(data, SYNC):
            machine.handle(message)
        return True

    return Ready([pack(data) for data in vectors("sync")], take, framed(SYNC))


@target("sync messages", 100)
def _sync_messages(_folder: Path) -> Ready:
    return each(SYNC, "sync")


@target("intent", 200)
def _intent(_folder: Path) -> Ready:
    span = Span(manifest="m", variant="int4", first=0, last=8)
    standing = (
        Standing(span=span, target=None, leaving=False),
        Standing(span=span, target=dataclasses.replace(span, last=4), leaving=True),
        Standing(span=None, target=None, leaving=False),
    )

    def take(data: bytes) -> bool:
        message, keeper = HOLDS.decode(data), Keeper()
        if isinstance(message, Hold):
            for number, one in enumerate(standing):
                HOLDS.encode(keeper.asked(f"peer {number}", message, one, 1.0))
            keeper.promised(0, 9, 2.0)
        return True

    return Ready(vectors("intent"), take, one_message(HOLDS), (odd_cbor, injured))


@target("pipe", 40)
def _pipe(_folder: Path) -> Ready:
    """Frames that come to an origin and to a stage, whoever sends them."""
    from tests.unit.test_pipe import ROUTE, SAMPLING, S, running

    opening = Open(
        session=S,
        attempt=1,
        origin="me",
        manifest="m",
        variant="int4",
        route=ROUTE,
        index=2,
        capacity=64,
        sampling=SAMPLING,
    )
    time = HopTime(network_us=1, queue_us=1, compute_us=1)

    def take(data: bytes) -> bool:
        origin, stage = running(), StageSession(opening, "cat")
        for message, _ in messages_in(data, PIPE):
            if isinstance(message, (Opened, Refused, Token, Pooled)):
                for peer in ("cat", "bob", "eve"):
                    with suppress(RemoteProtocolError):
                        origin.handle(pipe.Received(peer, dataclasses.replace(message, session=S, attempt=1), 1), 1.0)
            elif isinstance(message, PipeStep):
                with suppress(RemoteProtocolError):
                    if stage.take("bob", dataclasses.replace(message, session=S, attempt=1)):
                        answer = stage.ran(Ran(message, 5, time))
                        assert answer is None or PIPE.encode(answer[1])
            elif isinstance(message, Open):
                with suppress(RemoteProtocolError):
                    assert StageSession(message, message.route[0].peer if message.route else "").patience >= 0
            elif isinstance(message, Close) and stage.may_close("bob"):
                stage.close()
        return True

    return Ready([pack(data) for data in vectors("pipe")], take, framed(PIPE))


@target("pipe messages", 200)
def _pipe_messages(_folder: Path) -> Ready:
    return each(PIPE, "pipe")


@target("engine wire", 150)
def _enginewire(_folder: Path) -> Ready:
    load = message_of(next(iter(REQUESTS)), random.Random(1))
    step = Step(number=0, session=bytes(16), position=0, rows=1, sample=True, prefill=False)

    def take(data: bytes) -> bool:
        node, engine = NodeSide(), EngineSide()
        node.ask(load)
        good = 0
        for frame in FrameReader(max_body=1 << 20).feed(data):
            with suppress(RemoteProtocolError):
                engine.take(dataclasses.replace(REQUESTS.decode(frame.header), number=engine._last + 1))
                good += 1
            with suppress(RemoteProtocolError):
                node.answered(dataclasses.replace(ANSWERS.decode(frame.header), number=1 + good))
                good += 1
            with suppress(LocalProtocolError):
                node.ask(step)
        return good > 0

    frames = [pack(data) for data in vectors("enginewire")]
    both = (framed(REQUESTS), framed(ANSWERS))
    first = pack(ANSWERS.encode(Stepped(number=1, token=1, compute_us=1)))
    return Ready([*frames, first], take, lambda chance: chance.choice(both)(chance))


@target("bitswap", 150)
def _bitswap(_folder: Path) -> Ready:
    wanted = hashlib.sha256(b"wanted").digest()
    cid = b"\x01\x55\x12\x20" + wanted

    def take(data: bytes) -> bool:
        message = bitswap.decode(data)
        server = Server(lambda one: 100 if one[-1] & 1 else None)
        server.handle(PEER, message)
        while (answer := server.next()) is not None:
            server.done(answer.peer)
        client = bitswap_client.Client()
        client.handle(bitswap_client.PeerUp(PEER), 0.0)
        client.handle(bitswap_client.Want(1, {cid: 6}), 0.0)
        client.handle(bitswap_client.Offer(1, (PEER,)), 0.0)
        blocks = [(block.cid(), block.data) for block in message.blocks]
        presences = [(one.cid, one.type) for one in message.presences]
        client.handle(bitswap_client.Arrived(PEER, blocks, presences), 1.0)
        client.handle(bitswap_client.Tick(), 100.0)
        return True

    block = bitswap.Message(blocks=(bitswap.Block(prefix=cid[:4], data=b"wanted"),))
    return Ready([*vectors("bitswap"), bitswap.encode(block)], take)


@target("bitswap stream")
def _bitswap_stream(_folder: Path) -> Ready:
    def take(data: bytes) -> bool:
        reader = bitswap.MessageReader()
        for piece in pieces(data):
            for message in reader.feed(piece):
                with suppress(RemoteProtocolError):
                    bitswap.decode(message)
        return True

    whole = [len(data).to_bytes(1, "big") + data for data in vectors("bitswap") if len(data) < 128]
    return Ready([*whole, b"".join(whole)], take)


@target("kad", 200)
def _kad(_folder: Path) -> Ready:
    us = peer_id_of(bytes(32))

    def take(data: bytes) -> bool:
        message = kad.decode(data)
        kad.decode(kad.encode(message))
        walk = kad_lookup.Lookup(kad.Kind.GET_PROVIDERS, b"\x12\x20" + bytes(32), us, 0.0)
        walk.handle(kad_lookup.Begin((kad.Peer(PEER, ("/ip4/192.0.2.1/tcp/1",)),)), 0.0)
        walk.handle(kad_lookup.Answered(PEER, message.closer, message.providers), 0.1)
        while not walk.over:
            walk.handle(kad_lookup.Tick(), walk.deadline)
        return True

    return Ready(vectors("kad"), take)


@target("kad stream")
def _kad_stream(_folder: Path) -> Ready:
    def take(data: bytes) -> bool:
        reader = kad.MessageReader()
        for piece in pieces(data):
            for message in reader.feed(piece):
                with suppress(RemoteProtocolError):
                    kad.decode(message)
        return True

    whole = [len(data).to_bytes(1, "big") + data for data in vectors("kad") if len(data) < 128]
    return Ready([*whole, b"".join(whole)], take)


@target("mdns", 250)
def _mdns(_folder: Path) -> Ready:
    def take(data: bytes) -> bool:
        found = Discovery(PEER, Seal(bytes(32)), bytes, lambda: 0.5)
        found.begin(("/ip4/192.0.2.1/tcp/4331",), 0.0)
        found.receive(data, 1.0)
        found.tick(found.deadline)
        dns.parse(data)
        return True

    return Ready([*vectors("mdns"), dns.query(SERVICE)], take)


@target("mdns hint", 60)
def _mdns_hint(_folder: Path) -> Ready:
    """A hint of a member, sealed with the secret of the network."""
    seal = Seal(bytes(32))

    def take(data: bytes) -> bool:
        padded = (min(len(data), 0xFFFF).to_bytes(2, "big") + data).ljust(PLAIN_BYTES, b"\0")[:PLAIN_BYTES]
        sealed = bytes(seal._box.encrypt(padded, bytes(NONCE_BYTES)))
        starts = range(0, len(sealed), STRING_BYTES)
        strings = tuple(key + sealed[at : at + STRING_BYTES] for key, at in zip(KEYS, starts, strict=True))
        found = Discovery(PEER, seal, bytes, lambda: 0.5)
        return found.receive(dns.response(SERVICE, f"a.{SERVICE}", strings, 120), 1.0)

    hint = Hint(peer=peer_id_of(bytes(range(32))), addresses=("/ip4/192.0.2.1/tcp/4331", "/ip6/2001:db8::1/tcp/1"))
    return Ready([encode(hint)], take, lambda chance: encode(message_of(Hint, chance)), (odd_cbor, injured))


@target("unixfs", 400)
def _unixfs(_folder: Path) -> Ready:
    def take(data: bytes) -> bool:
        node = unixfs.decode(data)
        with suppress(RemoteProtocolError):  # of a shape that files don't have
            assembly = Assembly(cid_of(0x70, data), node.size)
            assembly.add_node(assembly.root, data)
        return True

    return Ready(vectors("unixfs"), take)


# ---------------------------------------------------------------- files


@target("car", 400)
def _car(_folder: Path) -> Ready:
    def take(data: bytes) -> bool:
        reader = Reader()
        for piece in pieces(data):
            reader.feed(piece)
            while reader.next() is not None:
                pass
        reader.finish()
        return True

    return Ready(vectors("car"), take)


@target("car import", 1)
def _car_import(folder: Path) -> Ready:
    """Whole files; blocks that were injured get the CIDs of their new bytes, so that what is in them is read."""
    from meshnode.ipfs.car_export import export_car, files_of
    from meshnode.ipfs.car_import import import_car
    from meshnode.publisher.release import release
    from meshnode.store.blob_store import BlobStore
    from protocols.car.messages import Block, Header, encode_block, encode_header
    from tests.process.mesh_rig import small_model

    published = small_model(folder / "model", layers=2, layer_bytes=2000)
    store = BlobStore(folder / "from", 1 << 30)
    cid, found = release(published, store, KEY, created_ms=NOW_MS, publisher=PEER)
    export_car(store, cid, files_of(found, found.variants), folder / "whole.car")
    whole = (folder / "whole.car").read_bytes()
    source, into = folder / "fuzzed.car", BlobStore(folder / "into", 1 << 24)

    def take(data: bytes) -> bool:
        source.write_bytes(data)
        for name in (cid, *found.all_files()):
            into.unpin(name)
        with suppress(MeshError):
            import_car(into, source)
        root = cid_of(DAG_CBOR, data[: 1 << 20])
        source.write_bytes(
            encode_header(Header((cid_to_bytes(root),))) + encode_block(Block(cid_to_bytes(root), data[: 1 << 20]))
        )
        import_car(into, source)
        return False

    block = store.block(cid)
    assert block is not None
    return Ready([whole, whole, bytes(block)], take)


@target("manifest", 60)
def _manifest(_folder: Path) -> Ready:
    """As it comes, and with what it says signed anew."""

    def take(data: bytes) -> bool:
        with suppress(RemoteProtocolError):
            manifest.open_manifest(data)
        try:
            item = dag_cbor.loads(data, "a manifest")
        except ValueError:
            return False
        said = item["manifest"] if isinstance(item, dict) and "manifest" in item else item
        if isinstance(said, dict) and "publisher" in said:
            said = {**said, "publisher": PEER}
        signature = KEY.sign(manifest.DOMAIN + dag_cbor.dumps(said)).signature
        wire = {"key": bytes(KEY.verify_key), "manifest": said, "signature": signature}
        manifest.encode_manifest(manifest.open_manifest(dag_cbor.dumps(wire)))
        return True

    return Ready(vectors("manifest"), take, None, (odd_cbor, injured))


@target("adapter", 60)
def _adapter(_folder: Path) -> Ready:
    """The manifest; what is taken is written the same way again."""

    def take(data: bytes) -> bool:
        assert encode_adapter(decode_adapter(data)) == data
        return True

    return Ready(vectors("adapter"), take, None, (odd_cbor, injured))


@target("adapter file", 60)
def _adapter_file(_folder: Path) -> Ready:
    """Of one layer; what is taken has numbers only."""
    from meshnode.model.adapter_file import read_layer, write_layer
    from tests.adapters import random_pairs

    def take(data: bytes) -> bool:
        pairs = read_layer(data, 2)
        assert read_layer(write_layer(pairs), 2).keys() == pairs.keys()
        return True

    def other_header(data: bytes, chance: random.Random) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        header = odd_json(data[8:end], chance)
        return len(header).to_bytes(8, "little") + header + data[end:]

    seeds = [write_layer(random_pairs(1, 0, ("q_proj",), rank=2), half=half) for half in (False, True)]
    return Ready(seeds, take, None, (other_header, injured))


@target("frame of adapters", 60)
def _adapter_frame(_folder: Path) -> Ready:
    def take(data: bytes) -> bool:
        frame = decode_frame(data)
        assert encode_frame(frame) == data
        assert frame.parameters > 0
        return True

    return Ready(
        [encode_frame(FRAME), encode_frame(dataclasses.replace(FRAME, factors="alternating", period=5))], take
    )


@target("delta record", 15)
def _delta_record(_folder: Path) -> Ready:
    """What a member signs, judged and put into the history."""
    expected = Expected(frame=FRAME.cid, parameters=FRAME.parameters, base=None, round=3, adds=False)
    key = key_of("ann")
    state = {"lineage": Lineage(FRAME.cid), "count": 0}

    def take(data: bytes) -> bool:
        state["count"] += 1
        if state["count"] % 500 == 0:
            state["lineage"] = Lineage(FRAME.cid)
        signed = sign_record(key, DELTA_RECORD, data[: 1 << 12])
        record = open_delta(signed)
        for last in (None, plain):
            judge_record(record, expected, may_train=True, last=last)
        judge_age(record, expected)
        proof = state["lineage"].add(signed, record)
        assert proof is None or prove(proof).peer == record.peer
        state["lineage"].ancestors(record_cid(signed))
        return True

    plain = delta_record("ann", 2)
    seeds = [encode(plain), encode(delta_record("ann", 3, 1, recent=3, parents=[record_cid(b"x")]))]
    seeds.append(encode(dataclasses.replace(plain, adds=True, whole=plain.made, base=plain.frame)))
    return Ready(seeds, take, None, (odd_cbor, injured))


@target("cohort", 15)
def _cohort(_folder: Path) -> Ready:
    """What a member of a cohort signs, heard by another one at any time."""
    table = Table(4)
    table.run()
    said = [member.said for member in table.members]

    def take(data: bytes) -> bool:
        claimed = decode(Word, data[:3500]).peer
        name = next((name for name in NAMES if peer_of(name) == claimed), "bob")
        word = open_word(sign_record(key_of(name), COHORT_RECORD, data[:3500]))
        machine = Table(4).members[0].machine
        machine.handle(Begin(), 0.0)
        events = [Heard(said[i][step]) for step in range(4) for i in (1, 2, 3)]
        events.insert(data[-1] % 13, Heard(word))
        for event in events:
            effects = machine.handle(event, 0.0)
            if any(isinstance(effect, Mask) for effect in effects):
                hidden = said[0][-1].masked
                assert hidden is not None
                machine.handle(Stored(hidden.cid, hidden.size), 0.0)
                for peer in table.cohort.members[1:]:
                    machine.handle(Fetched(peer), 0.0)
        return True

    return Ready([encode(word) for words in said for word in words], take, None, (odd_cbor, injured))


@target("delta", 100)
def _delta(_folder: Path) -> Ready:
    """Bytes that claim to be a delta of 5000 values."""
    values = 5000

    def take(data: bytes) -> bool:
        good = False
        for codec in Codec:
            with suppress(RemoteProtocolError):
                vector = unpack_delta(data, codec=codec, parameters=values)
                assert vector.shape == (values,)
                assert bool(np.isfinite(vector).all())
                good = True
        return good

    chance = np.random.default_rng(1)
    vectors = [chance.standard_t(3, values).astype(np.float32), np.zeros(values, np.float32)]
    vectors.append(np.where(np.arange(values) % 3, 0, vectors[0]).astype(np.float32))
    return Ready([pack_delta(codec, vector).payload for codec in Codec for vector in vectors], take)


@target("gguf", 20, needs=("gguf",))
def _gguf(folder: Path) -> Ready:
    from meshnode.publisher.gguf import GgufFile

    path = folder / "fuzzed.gguf"

    def take(data: bytes) -> bool:
        path.write_bytes(data)
        file = GgufFile(path)
        for tensor in file.tensors.values():
            if tensor.size < 1 << 16:
                file.read(tensor.name)
        return True

    return Ready(gguf_files(), take)


@target("gguf checkpoint", 1, needs=("gguf", "transformers"))
def _gguf_checkpoint(folder: Path) -> Ready:
    """What `meshnode model add FILE.gguf` reads of a file before it cuts it."""
    import transformers

    from meshnode.publisher.checkpoint import GgufCheckpoint

    path = folder / "fuzzed.gguf"

    def take(data: bytes) -> bool:
        path.write_bytes(data)
        found = GgufCheckpoint(path)
        found.tokenizer()
        found.generation_config()
        for name in found.names():
            if prod(found.shape(name)) < 1 << 16:
                found.tensor(name)
        return True

    transformers.logging.set_verbosity_error()  # it warns of most files
    entry, first = re.compile(rb"general|llama\.|tokenizer\."), gguf_files()[0]

    def fresh(chance: random.Random) -> bytes:
        """The first file with another value somewhere in its metadata: a number, a name, or the kind of a value."""
        places = [found.start() for found in entry.finditer(first)]
        at = chance.choice(places)
        size = int.from_bytes(first[at - 8 : at], "little")
        value = at + size
        number = struct.pack("<I", chance.choice((0, 1, 3, 1 << 31, (1 << 32) - 1)))
        match chance.randrange(4):
            case 0:
                return first[:value] + number + first[value + 4 :]
            case 1:
                return first[: value + 4] + number + first[value + 8 :]
            case 2:
                return first[: at + size - 1] + b"x" + first[value:]
        return first[:value] + struct.pack("<I", chance.choice((5, 6, 7))) + first[value + 4 :]

    return Ready([first], take, fresh)


def gguf_files() -> list[bytes]:
    """Small GGUF files: one with the tensors of one layer, one with an array of arrays, one of big metadata."""

    def text(words: str) -> bytes:
        return struct.pack("<Q", len(words.encode())) + words.encode()

    def entry(key: str, kind: int, value: bytes) -> bytes:
        return text(key) + struct.pack("<I", kind) + value

    def strings(words: list[str]) -> bytes:
        return struct.pack("<IQ", 8, len(words)) + b"".join(text(word) for word in words)

    def u32(number: int) -> bytes:
        return struct.pack("<I", number)

    words = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab"]
    numbers = {
        "embedding_length": 32,
        "feed_forward_length": 32,
        "block_count": 1,
        "attention.head_count": 2,
        "context_length": 64,
    }
    metadata = [
        entry("general.architecture", 8, text("llama")),
        *(entry(f"llama.{name}", 4, u32(number)) for name, number in numbers.items()),
        entry("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
        entry("tokenizer.ggml.model", 8, text("llama")),
        entry("tokenizer.ggml.tokens", 9, strings(words)),
        entry("tokenizer.ggml.scores", 9, struct.pack("<IQ", 6, len(words)) + bytes(4 * len(words))),
        entry(
            "tokenizer.ggml.token_type",
            9,
            struct.pack("<IQ", 5, len(words)) + struct.pack(f"<{len(words)}i", 2, 3, 3, 6, 1, 1, 1, 1),
        ),
        entry("tokenizer.ggml.bos_token_id", 4, u32(1)),
        entry("tokenizer.ggml.eos_token_id", 4, u32(2)),
        entry("tokenizer.chat_template", 8, text("{{ messages[0].content }}")),
    ]
    shapes = {
        "token_embd.weight": (2, len(words)),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
    }
    head, body = b"", b""
    for number, (name, shape) in enumerate(shapes.items()):
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        kind, size = (8, count // 32 * 34) if number == 3 else (0, count * 4)  # q8_0, f32
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(body))
        body += bytes(size) + bytes(-size % 32)

    def file(tensors: int, entries: list[bytes], rest: bytes, body: bytes) -> bytes:
        data = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(entries)) + b"".join(entries) + rest
        return data + bytes(-len(data) % 32) + body

    nested = entry("nested", 9, struct.pack("<IQ", 9, 2) + (struct.pack("<IQ", 4, 1) + u32(7)) * 2)
    deep = entry("deep", 9, struct.pack("<IQ", 9, 1) * 40 + struct.pack("<IQ", 4, 0))
    few = [metadata[0], entry("general.alignment", 4, u32(64)), nested, deep]
    return [
        file(len(shapes), metadata, head, body),
        file(0, few, b"", b""),
        file(1, few, text("t") + struct.pack("<IQIQ", 1, 4, 0, 0), bytes(64)),
    ]


def safetensors_file(shapes: dict[str, tuple[int, ...]]) -> bytes:
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


@target("safetensors", 10, needs=("safetensors", "torch"))
def _safetensors(folder: Path) -> Ready:
    """The weights of a Hugging Face folder."""
    from meshnode.publisher.checkpoint import FolderCheckpoint

    (folder / "config.json").write_text('{"model_type": "llama"}')
    path = folder / "model.safetensors"

    def take(data: bytes) -> bool:
        path.unlink(missing_ok=True)  # the one before is mapped
        path.write_bytes(data)
        found = FolderCheckpoint(folder)
        for name in found.names():
            if prod(found.shape(name)) < 1 << 16:
                found.tensor(name)
        return True

    def odd_header(data: bytes, chance: random.Random) -> bytes:
        size = int.from_bytes(data[:8], "little")
        text = odd_json(data[8 : 8 + size], chance)
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return Ready(
        [safetensors_file({"model.layers.0.a.weight": (4, 8), "b": (3,)})], take, None, (odd_header, injured)
    )


@target("checkpoint folder", 5, needs=("safetensors", "torch"))
def _folder(folder: Path) -> Ready:
    """The JSON files of a Hugging Face folder: configuration, list of weights, tokenizer settings."""
    from meshnode.publisher.checkpoint import FolderCheckpoint

    (folder / "model.safetensors").write_bytes(safetensors_file({"b": (3,)}))
    (folder / "tokenizer.json").write_text(
        '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "added_tokens": []}'
    )
    files = (
        "config.json",
        "model.safetensors.index.json",
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
    )

    def take(data: bytes) -> bool:
        here = folder / files[hashlib.sha256(data).digest()[0] % len(files)]
        before = here.read_bytes() if here.is_file() else None
        here.write_bytes(data)
        try:
            if not (folder / "config.json").is_file():
                (folder / "config.json").write_text('{"model_type": "llama"}')
            found = FolderCheckpoint(folder)
            found.generation_config()
            found.tokenizer()
        finally:
            here.unlink()
            if before is not None:
                here.write_bytes(before)
        return True

    seeds = (
        {"model_type": "llama", "quantization_config": None},
        {"weight_map": {"b": "model.safetensors"}, "metadata": {"total_size": 12}},
        {"eos_token_id": [1, 2]},
        {
            "bos_token": {"content": "<s>"},
            "eos_token": "</s>",
            "chat_template": [{"name": "default", "template": "x"}],
        },
        {"added_tokens": [{"id": 1, "content": "<s>", "special": True}], "model": {"type": "BPE", "vocab": {"a": 0}}},
    )
    return Ready([json.dumps(seed).encode() for seed in seeds], take, None, (odd_json, injured))


@target("graph", 150)
def _graph(folder: Path) -> Ready:
    from meshnode.engine import trial
    from tests.fuzz.graph import check

    trial._write_model(folder / "graph", folder / "weights")
    return Ready([(folder / "graph").read_bytes()], lambda data: check(data) == "cut")


# ---------------------------------------------------------------- what the person at the device gives


@target("config", 4)
def _config(folder: Path) -> Ready:
    from meshnode.config.load import describe as settings_text
    from meshnode.config.load import load_config
    from meshnode.core.paths import Paths

    Paths(folder).create()
    path = Paths(folder).config
    whole = settings_text(load_config(folder, {}))

    def take(data: bytes) -> bool:
        path.write_bytes(data)
        settings_text(load_config(folder, {}))
        return True

    values = (
        '"800MB"',
        '"50%"',
        "true",
        "0",
        "-1",
        "[]",
        '["a"]',
        "1.5",
        "inf",
        "{a = 1}",
        "1979-05-27",
        '"9"',
        "0xff",
        '"\\u0000"',
    )
    keys = [line.partition(" = ") for line in whole.splitlines() if " = " in line and not line.startswith("#")]
    sections = [line for line in whole.splitlines() if line.startswith("[")]

    def fresh(chance: random.Random) -> bytes:
        lines = [chance.choice(sections)]
        for key, _, value in chance.sample(keys, 3):
            lines.append(f"{key} = {chance.choice((*values, value.partition('  #')[0]))}")
        return "\n".join(lines).encode()

    by_section = ["\n".join(part) for part in _sections(whole)]
    return Ready([whole.encode(), *(part.encode() for part in by_section)], take, fresh)


def _sections(text: str) -> list[list[str]]:
    found: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("["):
            found.append([])
        if found:
            found[-1].append(line)
    return found


@target("control request", 400)
def _control(_folder: Path) -> Ready:
    """A line on the control socket, and what it says as a question."""
    from meshnode.api.control import read_request
    from meshnode.text.question import read_question

    def take(data: bytes) -> bool:
        request = read_request(data, ("status", "generate", "ready", "serve"))
        json.dumps(read_question(request).as_json())
        return True

    seeds = [
        {"do": "status"},
        {
            "do": "generate",
            "prompt": "a",
            "max_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 4,
            "seed": 1,
            "stop": ["x"],
        },
        {"do": "generate", "messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
        {"do": "generate", "token_ids": [1, 2, 3], "repetition_penalty": 1.1, "stop": "y"},
        {"do": "ready", "seconds": 1.5},
    ]
    return Ready([json.dumps(seed).encode() for seed in seeds], take, None, (odd_json, injured))


def _samples(kind: str, seeds: list[bytes], *injure: Injure) -> Ready:
    import io

    from meshnode.state.sample_files import read_samples

    def take(data: bytes) -> bool:
        return any(True for _ in read_samples(io.BytesIO(data), "fuzz", "csv" if kind == "csv" else "jsonl"))

    return Ready(seeds, take, None, (*injure, injured))


@target("samples in JSON lines", 200)
def _jsonl(_folder: Path) -> Ready:
    """A file that somebody imports."""
    lines = [
        {"input": "a", "label": "x"},
        {"input": "b\n", "label": "y", "output": "z", "correct": False, "id": 7},
    ]
    return _samples("jsonl", [json.dumps(line).encode() for line in lines], odd_json)


@target("samples in CSV", 200)
def _csv(_folder: Path) -> Ready:
    """A table that somebody imports."""
    return _samples("csv", [b'input,label\na,x\n"b ""c""\n",y\n', b"label;correct;input\nx;true;a\n\ny;wrong;b\n"])
