"""GossipSub of py-libp2p 0.8.1 among members, as cheap as it can be for who takes what others send.

What the release does as shipped: it gossips with every peer that connects; every message makes a task for each copy,
notices to neighbours and a signed record of addresses; one that came from two sides at once is delivered twice; a
neighbour is read as fast as it writes, and what it writes is verified before anybody asks whether it is wanted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import trio
from libp2p.io.exceptions import IOException, MessageTooLarge
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from meshnode.core.log import get_logger
from meshnode.net.port import MAX_GOSSIP_BYTES, Take
from protocols.bucket import Buckets
from protocols.ids import PeerId

MESHSUB: Final = "/meshsub/1.2.0"
# Gossip partners per topic: wanted, at least, at most. Anti-entropy repairs what is lost; far apart, or partners are
# taken and given up all the time.
DEGREE: Final = (4, 2, 12)
GOSSIP_PER_SECOND: Final = 1000.0  # messages per peer and topic; the library's 10 drops bursts of its own node
GOSSIP_QUEUE: Final = 256  # messages waiting for one peer
RPC_BYTES: Final = 4 * MAX_GOSSIP_BYTES

# What one neighbour may bring, in messages that we have not seen; beyond, it is read more slowly. A hundred idle
# nodes together say something once in two seconds, and each says what has changed at most twice a second.
MESSAGES_PER_S: Final = 20.0
MESSAGE_BURST: Final = 300.0
COPY: Final = 0.1  # a message that we have seen, or a frame, counts as that
CONTROL_BYTES: Final = 256  # of orders to the router and of subscriptions count as one
SLOW_S: Final = 5.0  # the longest pause for one frame

_log = get_logger("net")


class GuardedPubsub(Pubsub):  # type: ignore[misc]  # the library has no types here
    """Gossip with admitted peers only; every message delivered once."""

    def __init__(self, host: Any, router: Any, admits: Callable[[PeerId], bool]) -> None:
        super().__init__(host, router, strict_signing=True, max_inbound_rpc_size=RPC_BYTES)
        # The release starts at the seconds since 1970: after a restart its numbers, and so its message ids, repeat.
        self.counter = time.time_ns()
        self.takers: dict[str, Take] = {}  # by topic
        self.flooded: Callable[[PeerId], None] = lambda peer: None
        self._admits = admits
        self._in_work: set[bytes] = set()  # message ids
        self._greeting: set[Any] = set()
        self._allowances = Buckets(MESSAGES_PER_S, MESSAGE_BURST)

    async def _handle_new_peer(self, peer_id: Any) -> None:
        if not self._admits(PeerId(str(peer_id))) or peer_id in self._greeting:
            return
        self._greeting.add(peer_id)
        try:
            await super()._handle_new_peer(peer_id)
            if peer_id in self.peer_queues:
                self.peer_queues[peer_id]._queue.max_size = GOSSIP_QUEUE
        finally:
            self._greeting.discard(peer_id)

    def greet(self, peer: PeerId) -> None:
        """Start gossip with a peer that is connected and admitted."""
        peer_id = ID.from_string(peer)
        if peer_id not in self.peers and self.manager.is_running:
            self.manager.run_task(self._handle_new_peer_with_retry, peer_id, 1.0)

    # Reading

    async def continuously_read_stream(self, stream: Any) -> None:
        """Take what a neighbour sends, one message after the other, until its stream ends.

        What comes too fast is not dropped but left to the sender: a copy of the same message that another neighbour
        brings is as good, and whoever floods fills its own buffers.
        """
        peer_id = stream.muxed_conn.peer_id
        try:
            while self.manager.is_running:
                data = await read_varint_prefixed_bytes_limited(stream, self.max_inbound_rpc_size)
                rpc = rpc_pb2.RPC()
                rpc.ParseFromString(data)
                await self._take_frame(peer_id, rpc)
        except MessageTooLarge:
            await stream.reset()
            self._handle_dead_peer(peer_id)
        except (StreamError, IOException, RawConnError) as error:
            _log.debug("gossip.ended", peer=str(peer_id), reason=str(error))

    async def _take_frame(self, peer_id: Any, rpc: Any) -> None:
        rpc.ClearField("senderRecord")  # addresses come in adverts
        orders = rpc.control.ByteSize() + sum(topic.ByteSize() for topic in rpc.subscriptions)
        await self._slow_down(peer_id, COPY + orders / CONTROL_BYTES)
        for message in rpc.publish:
            fresh = self._is_subscribed_to_msg(message)
            await self._slow_down(peer_id, 1.0 if fresh else COPY)
            if fresh:
                await self.push_msg(peer_id, message)
        if len(rpc.subscriptions) <= self.max_subscriptions_per_rpc:
            for subscription in rpc.subscriptions:
                self.handle_subscription(peer_id, subscription)
        if rpc.HasField("control"):
            await self.router.handle_rpc(rpc, peer_id)

    async def _slow_down(self, peer_id: Any, cost: float) -> None:
        now = trio.current_time()
        wait_s = self._allowances.of(peer_id, now).spend(cost, now, SLOW_S)
        if wait_s:
            self.flooded(PeerId(str(peer_id)))
            await trio.sleep(wait_s)

    async def push_msg(self, msg_forwarder: Any, msg: Any) -> None:
        """Take a message and pass it on, once even when several peers bring it at the same time.

        Its taker is asked before its signature is checked: records are signed themselves, and most of what a flood
        brings is wanted by nobody. What is passed on has been checked.
        """
        name = self._msg_id_constructor(msg)
        if name in self._in_work or len(msg.data) > MAX_GOSSIP_BYTES or len(msg.topicIDs) != 1:
            return
        self._in_work.add(name)
        try:
            if msg_forwarder == self.my_id or self._takes(PeerId(str(msg_forwarder)), msg):
                await super().push_msg(msg_forwarder, msg)
        except Exception as error:  # noqa: BLE001 - the border: the library re-raises on keys it can't decode
            _log.warning("gossip.contained", peer=str(msg_forwarder), reason=_reason(error))
        finally:
            self._in_work.discard(name)

    def _takes(self, forwarder: PeerId, message: Any) -> bool:
        topic = message.topicIDs[0]
        take = self.takers.get(topic)
        try:
            return take is not None and take(forwarder, message.data)
        except Exception:  # noqa: BLE001 - the border: a bug in a taker costs its message, not the process
            _log.exception("gossip.failed", topic=topic, peer=forwarder)
            return False

    def _is_subscribed_to_msg(self, msg: Any) -> bool:
        """Whether a message is worth a look: of each, several neighbours bring a copy."""
        name = self._msg_id_constructor(msg)
        known = name in self._in_work or self.seen_messages.has(name)
        return not known and super()._is_subscribed_to_msg(msg)

    async def validate_msg(self, msg_forwarder: Any, msg: Any) -> None:
        """Its taker has been asked."""

    def notify_subscriptions(self, publish_message: Any) -> None:
        """Its subscriber has it already: it was asked whether the message is good."""

    # Writing

    async def write_msg(self, stream: Any, rpc_msg: Any) -> bool:
        """Without the signed record of our addresses, which the library puts into every message for its reader to
        check: addresses come in adverts."""
        rpc_msg.ClearField("senderRecord")
        return bool(await super().write_msg(stream, rpc_msg))


class GuardedRouter(GossipSub):  # type: ignore[misc]  # the library has no types here
    """GossipSub without IDONTWANT and IHAVE: our messages are a few KB and there at once, so notices, which go to
    neighbours for each of them, cost more than the doubles that they save; what is lost, anti-entropy brings."""

    async def _maintain_mesh_quality(self, topic: str) -> None:
        """Partners are kept: it gives some up every second and takes others, which costs more than the messages."""

    def gossip_heartbeat(self) -> Any:
        """Nobody is told what we have."""
        return {}

    async def _emit_idontwant_for_message(self, msg_id: Any, topic_ids: Any) -> None:
        """Nothing is sent."""


def make_router() -> GuardedRouter:
    degree, low, high = DEGREE
    return GuardedRouter(
        [MESHSUB],
        degree,
        low,
        high,
        heartbeat_interval=1,
        prune_back_off=10,
        adaptive_gossip_enabled=False,
        eclipse_protection_enabled=False,  # counts addresses; the nodes of one home share theirs
        max_messages_per_topic_per_second=GOSSIP_PER_SECOND,
    )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
