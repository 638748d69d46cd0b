"""What a running node can be asked, in plain data: the table behind the control socket and the library."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, Final

import trio

from meshnode.api import rollouts
from meshnode.api.asking import ask, embed, judge, name_peers
from meshnode.api.duties import ORDERS, obey
from meshnode.api.messages import Answer, Json, Piece, plain
from meshnode.api.releases import check_servable, check_variant, find_release
from meshnode.api.status import status_of
from meshnode.core.errors import BadRequest, Declined, ModelError
from meshnode.core.sizes import format_size
from meshnode.membership.enrolment import open_ticket
from meshnode.model.fit import facts_of
from meshnode.node import Node
from meshnode.policy.mesh_view import nodes_of
from meshnode.policy.moves import wanted_plan
from meshnode.services.inference.receipt import Waiting
from meshnode.text.question import MAX_SHOWN, read_question
from protocols.errors import RemoteProtocolError
from protocols.ids import DAG_CBOR, Cid, cid_codec
from protocols.manifest.codec import open_manifest
from protocols.manifest.messages import Manifest
from protocols.notice.messages import LESSON
from protocols.pairing.messages import OPEN_S

MAX_WAIT_S: Final = 86_400.0
QUIET: Final = ("status", "ready")  # asked all the time, and nothing comes of it

Command = Callable[[Json], AsyncGenerator[Json, None]]


class Commands:
    """The commands of one node."""

    def __init__(self, node: Node, api_url: str = "") -> None:
        """`api_url`: where the node answers HTTP."""
        self._node = node
        self._api_url = api_url
        table: dict[str, Command] = {
            "status": self._status,
            "ready": self._ready,
            "generate": self._generate,
            "embed": self._embed,
            "feedback": self._feedback,
            "serve": self._serve,
            "retract": self._retract,
            "fetch-manifest": self._fetch_manifest,
            "pin": self._pin,
            "releases": self._releases,
            "propose": self._propose,
            "roll-back": self._roll_back,
            "learn-start": self._learn_start,
            "learn-stop": self._learn_stop,
            "members-changed": self._members_changed,
            **{order: partial(self._obey, order) for order in ORDERS},
            "pair": self._pair,
            "stop": self._stop,
        }
        self.table: Final = {name: partial(self._noted, name, command) for name, command in table.items()}

    async def _noted(self, name: str, command: Command, request: Json) -> AsyncGenerator[Json, None]:
        """The command, and a line about it in the audit log."""
        if name not in QUIET:
            audit = self._node.parts.audit
            text = json.dumps(request, default=str) if audit.keeps_text else ""
            audit.note("socket", "this device", name, text)
        async with aclosing(command(request)) as answers:
            async for answer in answers:
                yield answer

    def name_peers(self, sentence: str) -> str:
        """See `asking.name_peers`."""
        return name_peers(self._node, sentence)

    async def _status(self, _request: Json) -> AsyncGenerator[Json, None]:
        yield {"done": status_of(self._node, self._api_url).as_json()}

    async def _ready(self, request: Json) -> AsyncGenerator[Json, None]:
        """Wait until a probe token has passed through the chain, or `seconds` are over."""
        seconds = request.get("seconds", 60)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= MAX_WAIT_S:
            raise BadRequest(f"seconds is {repr(seconds)[:MAX_SHOWN]}; it takes a number from 0 to {MAX_WAIT_S:.0f}")
        with trio.move_on_after(seconds):
            await self._node.readiness.wait_ready()
        ready = self._node.readiness.now
        yield {"done": {"ready": ready.ready, "readiness": ready.sentence}}

    async def _generate(self, request: Json) -> AsyncGenerator[Json, None]:
        async with aclosing(ask(self._node, read_question(request))) as events:
            async for event in events:
                match event:
                    case Waiting(why):
                        yield {"waiting": why}
                    case Piece(text, token, likelihood, call):
                        told: Json = {"text": text, "token": token}
                        if likelihood is not None:
                            told["likelihood"] = plain(likelihood)
                        if call is not None:
                            told["call"] = plain(call)
                        yield told
                    case Answer():
                        yield {"done": event.as_json()}

    async def _embed(self, request: Json) -> AsyncGenerator[Json, None]:
        """A text, or token ids, as one vector."""
        made = await embed(self._node, request.get("input", ""), adapter=request.get("adapter"))
        yield {"done": made.as_json()}

    async def _feedback(self, request: Json) -> AsyncGenerator[Json, None]:
        """Whether a kept answer was right, and what would have been."""
        judged = judge(self._node, request.get("answer"), request.get("correct"), request.get("label") or "")
        yield {"done": judged.as_json()}

    async def _serve(self, request: Json) -> AsyncGenerator[Json, None]:
        """Have the network serve a model that this node knows."""
        node, wanted = self._node, str(request.get("model"))
        cid, manifest, before = find_release(node.database, node.store, wanted, str(request.get("variant") or ""))
        variant = str(request.get("variant") or before or manifest.smallest_variant())
        check_servable(manifest, variant)
        if node.readiness.now.ready:
            _check_room(node, cid, manifest, variant)
        node.releases.announce(cid, variant)
        yield {"done": True}

    async def _retract(self, _request: Json) -> AsyncGenerator[Json, None]:
        """Take back this node's word about which model the network serves."""
        self._node.releases.retract()
        yield {"done": True}

    async def _fetch_manifest(self, request: Json) -> AsyncGenerator[Json, None]:
        """Fetch a manifest into the store, from members, IPFS peers or fallback sources."""
        await self._node.content.block(_manifest_cid(request))
        yield {"done": True}

    async def _pin(self, request: Json) -> AsyncGenerator[Json, None]:
        """Have every file of one variant on this node, and keep it."""
        node, cid = self._node, _manifest_cid(request)
        try:
            manifest = open_manifest(await node.content.block(cid))
        except RemoteProtocolError as error:
            raise ModelError(f"{cid} is not the manifest of a model: {error}") from error
        name = str(request.get("variant"))
        check_variant(manifest, name)
        refs = manifest.files_of(name)
        total, done = sum(ref.size for ref in refs), 0
        node.store.pin(cid, cid)
        for ref in refs:
            yield {"fetched": done, "total": total}
            await node.content.fetch(ref)
            node.store.pin(ref.cid, cid)
            done += ref.size
        yield {"fetched": total, "total": total}
        yield {"done": {"bytes": total}}

    async def _releases(self, _request: Json) -> AsyncGenerator[Json, None]:
        """Every release of an adapter that this node knows."""
        yield {"done": rollouts.as_json(rollouts.releases_of(self._node))}

    async def _propose(self, request: Json) -> AsyncGenerator[Json, None]:
        """Propose an adapter to be served."""
        yield {"done": await rollouts.propose(self._node, request.get("adapter"))}

    async def _roll_back(self, request: Json) -> AsyncGenerator[Json, None]:
        """Go back from a release."""
        yield {"done": rollouts.roll_back(self._node, request.get("release"), request.get("why"))}

    async def _learn_start(self, request: Json) -> AsyncGenerator[Json, None]:
        """Have the network learn: a lesson in place of the one that this node has given before."""
        from meshnode.api.lessons import give_lesson  # brings numpy

        yield {"done": await give_lesson(self._node, request)}

    async def _learn_stop(self, _request: Json) -> AsyncGenerator[Json, None]:
        """Take back the lesson that this node has given."""
        self._node.directory.notices.give(LESSON, b"")
        yield {"done": True}

    async def _members_changed(self, _request: Json) -> AsyncGenerator[Json, None]:
        """A command has put news about members into the state file: act on it, and tell everybody, now."""
        await self._node.membership.take_up()
        yield {"done": True}

    async def _obey(self, order: str, request: Json) -> AsyncGenerator[Json, None]:
        """Do less for the mesh, or all of it again."""
        yield {"done": plain(obey(self._node, order, request.get("seconds", 0)))}

    async def _pair(self, request: Json) -> AsyncGenerator[Json, None]:
        """Let in one device by a PIN, until it has come, or whoever asked has gone."""
        roles = request.get("roles", [])
        if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
            raise BadRequest(f"roles is {repr(roles)[:MAX_SHOWN]}; it takes a list of names such as serve")
        node = self._node
        async with node.pairing.open(roles) as pairing:
            yield {
                "pin": pairing.pin,
                "addresses": list(node.host.addresses),
                "seconds": OPEN_S,
                "roles": list(open_ticket(pairing.ticket).roles),
            }
            paired = await pairing.outcome()
            yield {"done": {"peer": paired.peer, "name": paired.name}}

    async def _stop(self, _request: Json) -> AsyncGenerator[Json, None]:
        self._node.stopping.set()
        yield {"done": True}


def _manifest_cid(request: Mapping[str, Any]) -> Cid:
    cid = request.get("manifest")
    try:
        if isinstance(cid, str) and cid_codec(cid) == DAG_CBOR:
            return Cid(cid)
    except RemoteProtocolError:
        pass
    raise BadRequest(f"manifest is {repr(cid)[:80]}; it takes the CID of a manifest, which begins with bafyrei")


def _check_room(node: Node, cid: Cid, manifest: Manifest, variant: str) -> None:
    """Raises Declined `does-not-fit`: a mesh that answers must not give up its model for one that it can't hold."""
    facts = facts_of(manifest, variant)
    holes = wanted_plan(facts, nodes_of(node.directory.live(), cid, variant, facts.layers)).holes
    if holes:
        missing = format_size(sum(facts.need(*hole) for hole in holes))
        raise Declined(
            "does-not-fit",
            f"{manifest.name} in {variant} does not fit into the memory that the nodes give: {missing} are missing. "
            "The network goes on with what it serves; start another node, or give a node more memory (serve.memory)",
        )
