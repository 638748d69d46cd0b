"""What a member with a plain ticket can try: each attack uses the parts of a real node as no node would."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import trio
from nacl.signing import SigningKey

from meshnode.core.errors import Declined, PeerUnreachable
from meshnode.net import heartbeat, pipes
from meshnode.net.port import Stream
from meshnode.node import Node
from meshnode.policy.route import NoRoute
from meshnode.services.inference.router import Router
from protocols.advert.messages import ADVERT, HEAD, LOSS, SERVING, Announcement, Loss, Serving
from protocols.bitswap import messages as bitswap
from protocols.codec import encode
from protocols.envelope import sign_record
from protocols.errors import RemoteProtocolError
from protocols.frame import pack
from protocols.ids import PeerId, peer_id_of
from protocols.intent import messages as intent
from protocols.membership import messages as membership
from protocols.notice.messages import ROLE_OF, Notice
from protocols.pipe.messages import Close, HopTime, Open, Opened, Ping, Sampling, Step, Token
from protocols.sync import messages as sync

LAST = (1 << 63) - 1
ALL = (membership, sync, intent, bitswap, heartbeat, pipes)
GONE = (PeerUnreachable, Declined, RemoteProtocolError)


@dataclass
class Hostile:
    """One such member."""

    node: Node
    rng: random.Random

    @property
    def us(self) -> PeerId:
        return self.node.identity.peer_id

    @property
    def router(self) -> Router:
        return Router(self.us, self.node.directory, self.node.releases, self.node.health)

    def others(self) -> list[PeerId]:
        return [peer for peer in self.node.host.peers if peer != self.us]

    async def gossip(self, record: bytes) -> None:
        await self.node.host.publish(f"/meshnode/records/{self.node.membership_file.network_id}", record)

    # Each attack goes on until it is cancelled.

    async def silent_opens(self) -> None:
        """A session of full length at every stage, and no step; again and again."""
        while True:
            release = self.node.releases.current
            assert release is not None
            chosen = self.router.choose(self.rng.getrandbits(32))
            if isinstance(chosen, NoRoute):
                await trio.sleep(0.2)
                continue
            route = chosen[1]
            session = self.rng.randbytes(16)
            for index, hop in enumerate(route):
                last = index == len(route) - 1
                message = Open(
                    session=session,
                    attempt=0,
                    origin=self.us,
                    manifest=release.cid,
                    variant=release.variant_name,
                    route=route,
                    index=index,
                    capacity=release.manifest.architecture.context,
                    sampling=Sampling(seed=0) if last else None,
                )
                with suppress(*GONE):
                    await self.node.pipes.send(PeerId(hop.peer), message, b"\1\0\0\0" if last else b"")
            await trio.sleep(0.02)

    async def _claim(self, decode_us: int) -> None:
        """Say that we serve everything, faster than anybody."""
        release = self.node.releases.current
        assert release is not None
        self.node.placement._publish = lambda: None  # type: ignore[method-assign]
        span = release.span((0, release.facts.layers))
        while True:
            me = replace(
                self.node.directory.me(),
                serving=Serving(state=SERVING, span=span, target=None, epoch=1, decode_us=decode_us),
                layer_decode_us=1,
                memory_bytes=1 << 40,
            )
            self.node.directory.advertise(me)
            await trio.sleep(0.5)

    async def black_hole(self) -> None:
        """Take every question, answer none."""
        self.node.pipes.handle(Open, lambda *_: None)
        self.node.pipes.handle(Step, lambda *_: None)
        await self._claim(1)

    async def forger(self) -> None:
        """Answer every question with nonsense, slowly, and say that it took no time."""
        answers, waiting = trio.open_memory_channel[tuple[PeerId, Any]](10_000)

        def open_it(peer: PeerId, message: Open, *_: object) -> None:
            opened = Opened(session=message.session, attempt=message.attempt, index=message.index)
            with suppress(trio.WouldBlock):
                answers.send_nowait((peer, opened))

        def stepped(peer: PeerId, message: Step, *_: object) -> None:
            times = (HopTime(network_us=0, queue_us=0, compute_us=1),)
            position = message.position + message.rows
            token = Token(session=message.session, attempt=0, position=position, token=77, sent_us=0, times=times)
            with suppress(trio.WouldBlock):
                answers.send_nowait((peer, token))

        async def answer() -> None:
            async for peer, message in waiting:
                if isinstance(message, Token):
                    await trio.sleep(0.1)
                with suppress(*GONE):
                    await self.node.pipes.send(peer, message)

        self.node.pipes.handle(Open, open_it)
        self.node.pipes.handle(Step, stepped)
        self.node.pipes.handle(Close, lambda *_: None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            await self._claim(1)

    async def strange_records(self) -> None:
        """Records of keys that belong to nobody, each twice and each time different."""
        while True:
            key = SigningKey(self.rng.randbytes(32))
            peer = PeerId(peer_id_of(bytes(key.verify_key)))
            for name in ("a", "b"):
                advert = replace(
                    self.node.directory.me(), peer=peer, incarnation=5, sequence=1, name=name, serving=None
                )
                advert = replace(advert, addresses=(), holdings=(), round_trips=())
                await self.gossip(sign_record(key, ADVERT, encode(advert)))
            await trio.sleep(0.01)

    async def own_records(self) -> None:
        """Adverts of its own, as many as can be signed, some of them twice and different."""
        number = 1000
        while True:
            number += 1
            for tags in ((), ("cpu",))[: 1 + (number % 50 == 0)]:
                advert = replace(self.node.directory.me(), sequence=number, tags=tags)
                await self.gossip(self.node.identity.sign(ADVERT, encode(advert)))
            await trio.sleep(0.005)

    async def heads(self) -> None:
        """Words about the served model that it may not say, of every date."""
        for number in range(1 << 30):
            date = self.rng.choice((1, self.node.parts.wall(), LAST))
            head = Announcement(
                peer=self.us,
                incarnation=date,
                sequence=number,
                created_ms=date,
                name="nothing",
                version="v1.0.0-0",
                manifest="bafyrei" + "a" * 52,
                variant="int4",
            )
            await self.gossip(self.node.identity.sign(HEAD, encode(head)))
            await trio.sleep(0.02)

    async def holds(self) -> None:
        """Have everybody promise to keep every layer, for ever."""
        release = self.node.releases.current
        assert release is not None
        while True:
            for peer in self.others():
                hold = intent.Hold(
                    manifest=release.cid,
                    variant=release.variant_name,
                    first=0,
                    last=self.rng.randint(1, release.facts.layers),
                    epoch=1,
                    hold_ms=intent.HOLD_MS,
                )
                await self._send(peer, intent.PROTOCOL, pack(intent.HOLDS.encode(hold)))
            await trio.sleep(0.01)

    async def streams(self) -> None:
        """Streams of every protocol, with noise."""
        while True:
            for peer in self.others():
                await self._send(peer, self.rng.choice(ALL).PROTOCOL, self.rng.randbytes(self.rng.randrange(4000)))
            await trio.sleep(0.005)

    async def wishes(self) -> None:
        """Wants for blocks that nobody has."""
        while True:
            entries = tuple(
                bitswap.Entry(cid=bytes((1, 0x55, 0x12, 32)) + self.rng.randbytes(32), priority=1)
                for _ in range(1000)
            )
            message = bitswap.encode(bitswap.Message(entries=entries))
            for peer in self.others():
                await self._send(peer, bitswap.PROTOCOL, bitswap_frame(message))
            await trio.sleep(0.05)

    async def notices(self) -> None:
        """Notices of every kind, which a plain member may not give, each newer than the one before."""
        for number in range(1 << 30):
            kind = self.rng.choice(tuple(ROLE_OF))
            notice = Notice(
                peer=self.us,
                incarnation=self.node.parts.wall() + number,
                sequence=0,
                kind=kind,
                content=self.rng.randbytes(self.rng.randrange(4000)),
            )
            await self.gossip(self.node.identity.sign(kind, encode(notice)))
            await trio.sleep(0.005)

    async def losses(self) -> None:
        """Say of everybody that it is lost."""
        while True:
            for peer in self.others():
                loss = Loss(peer=self.us, lost=peer, incarnation=LAST, sequence=LAST)
                await self.gossip(self.node.identity.sign(LOSS, encode(loss)))
            await trio.sleep(0.005)

    async def rosters(self) -> None:
        """Rosters with certificates and withdrawals that nobody has signed, and with those that everybody knows."""
        known = self.node.membership_file.chain
        while True:
            chains = (known, *((self.rng.randbytes(200),) for _ in range(20)))
            roster = membership.Roster(
                members=tuple(membership.Chain(certificates=chain) for chain in chains),
                withdrawals=tuple(
                    sign_record(SigningKey(self.rng.randbytes(32)), membership.WITHDRAWAL, b"") for _ in range(8)
                ),
            )
            await self.node.host.publish(membership.TOPIC, membership.HELLO.encode(roster))
            await trio.sleep(0.01)

    async def exchanges(self) -> None:
        """Exchanges of records without end, each with a digest of records that nobody has heard of."""
        while True:
            for peer in self.others():
                names = sorted((kind, self.rng.randbytes(32)) for kind in (ADVERT, HEAD, *ROLE_OF))
                digest = sync.Digest(
                    held=tuple(
                        sync.Held(name=sync.Name(domain=domain, signer=signer), incarnation=LAST, sequence=1)
                        for domain, signer in names
                    ),
                    more=False,
                )
                await self._send(peer, sync.PROTOCOL, pack(sync.SYNC.encode(digest)), reads=True)
            await trio.sleep(0.005)

    async def beats(self) -> None:
        """Heartbeats as fast as they come back."""

        async def beat(peer: PeerId) -> None:
            while True:
                with suppress(*GONE):
                    stream = await self.node.host.open_stream(peer, heartbeat.PROTOCOL)
                    while True:
                        await stream.send_all(bytes(8 * 64))
                        await stream.receive_some()
                await trio.sleep(0.1)

        async with trio.open_nursery() as nursery:
            for peer in self.others():
                nursery.start_soon(beat, peer)

    async def pings(self) -> None:
        """Pings of pipes, and steps and ends of sessions that nobody has opened."""
        for number in range(1 << 30):
            for peer in self.others():
                session = self.rng.randbytes(16)
                step = Step(session=session, attempt=0, position=0, rows=1, sample=False, sent_us=0)
                for message in (Ping(number=number, sent_us=0), step, Close(session=session, attempt=0)):
                    with suppress(*GONE):
                        await self.node.pipes.send(peer, message)
            await trio.sleep(0.001)

    async def halves(self) -> None:
        """Streams of every protocol that say half a message and nothing more, and read nothing."""
        held: list[Stream] = []
        while True:
            for peer in self.others():
                with suppress(*GONE), trio.move_on_after(1):
                    stream = await self.node.host.open_stream(peer, self.rng.choice(ALL).PROTOCOL)
                    held.append(stream)
                    await stream.send_all(pack(self.rng.randbytes(100))[:50])
            while len(held) > 1000:
                await held.pop(0).reset()
            await trio.sleep(0.005)

    async def reconnects(self) -> None:
        """Come and go."""
        known = {peer: advert.addresses for peer, advert in self.node.directory.live().items() if peer != self.us}
        while True:
            for peer, addresses in known.items():
                with suppress(*GONE):
                    await self.node.host.disconnect(peer, "for the sake of it")
                    await self.node.host.connect(peer, addresses)
            await trio.sleep(0.01)

    async def _send(self, peer: PeerId, protocol: str, data: bytes, *, reads: bool = False) -> None:
        with suppress(*GONE), trio.move_on_after(1):
            stream = await self.node.host.open_stream(peer, protocol)
            try:
                await stream.send_all(data)
                if reads:
                    await stream.receive_some()
            finally:
                await stream.reset()


def bitswap_frame(message: bytes) -> bytes:
    """Length, as an unsigned varint, and the message."""
    out, size = bytearray(), len(message)
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes((*out, size)) + message


def attacks(hostile: Hostile) -> dict[str, Callable[[], Awaitable[None]]]:
    names = (
        "silent_opens",
        "strange_records",
        "own_records",
        "heads",
        "holds",
        "streams",
        "wishes",
        "notices",
        "losses",
        "rosters",
        "exchanges",
        "beats",
        "pings",
        "halves",
        "reconnects",
        "black_hole",  # from here on it takes questions
        "forger",
    )
    return {name: getattr(hostile, name) for name in names}
