"""A mesh on this machine: making it, starting it, finding it again, stopping it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from meshnode.config.keep import keep_settings
from meshnode.config.values import parse_amount
from meshnode.core.clock import wall_ms
from meshnode.core.errors import ConfigError, DiskError
from meshnode.core.paths import Paths
from meshnode.harness.member import HarnessError, Member, clean_environment
from meshnode.membership.enrolment import create_invite, init_network, open_identity
from meshnode.membership.identity import Identity
from meshnode.membership.network import has_network, load_founder, load_network, save_network
from meshnode.model.fit import facts_of, tight_memory
from meshnode.publisher.release import release
from meshnode.state import releases
from meshnode.state.database import Database
from meshnode.store.blob_store import BlobStore
from protocols.ids import Cid, PeerId, short
from protocols.manifest.messages import Manifest
from protocols.membership import ROLES
from protocols.membership.messages import Certificate
from protocols.membership.trust import sign_certificate

FILE: Final = "mesh.json"
MAX_NODES: Final = 64
JOIN_S: Final = 60.0
TICKET_S: Final = 600.0
QUOTA_BYTES: Final = 1 << 50  # the cache's files are linked into the store, they take no room of their own


@dataclass(frozen=True, slots=True)
class Plan:
    """What a new mesh looks like.

    Args:
      nodes: serving nodes.
      memory: serve.memory of each ("60MB"); one for all, or one for each; empty: `tight` with a model, else 1GB.
      bootstrap: whether a bootstrap peer, which serves no layers, is the meeting point.
      published: folder of a published model that the first serving node gets; None: no model.
      variant: of that model.
      settings: further settings of every node, "serve.engine" -> "null".
    """

    nodes: int
    memory: tuple[str, ...] = ()
    bootstrap: bool = False
    published: Path | None = None
    variant: str = "int4"
    settings: tuple[tuple[str, object], ...] = ()


class Mesh:
    """The nodes of one folder."""

    def __init__(self, folder: Path, members: list[Member]) -> None:
        self.folder = folder
        self.members = members
        self.cold_start_s: float | None = None  # from the first process to the last one that answers

    # ------------------------------------------------------------ making and finding

    @classmethod
    def make(cls, folder: Path, plan: Plan) -> Mesh:
        """Make the data folders of a new mesh, with keys, ports and configuration. Nothing runs yet.

        Raises HarnessError (the folder holds a mesh), ConfigError, DiskError, ModelError.
        """
        if not 1 <= plan.nodes <= MAX_NODES:
            raise ConfigError(f"--nodes takes 1 to {MAX_NODES}")
        if len(plan.memory) not in (0, 1, plan.nodes):
            raise ConfigError(f"--memory takes one size for all, or {plan.nodes}, one for each node")
        for size in plan.memory:
            try:
                parse_amount(size)
            except ValueError as error:
                raise ConfigError(f"--memory: {error}") from error
        if (folder / FILE).exists():
            raise HarnessError(f"{folder} holds a mesh already; start it without --nodes, or remove the folder")
        names = (["bootstrap"] if plan.bootstrap else []) + [f"node{k}" for k in range(1, plan.nodes + 1)]
        members = []
        for name, port in zip(names, free_ports(len(names)), strict=True):
            data = folder / name
            Paths(data).create()
            peer = open_identity(data).peer_id
            members.append(
                Member(name, data, peer, f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}", serves=name != "bootstrap")
            )
        mesh = cls(folder, members)
        manifest = None if plan.published is None else mesh._give_model(plan.published, plan.variant)
        memory = mesh._memory(plan, manifest)
        for member in members:
            keep_settings(
                member.folder,
                {
                    "node.name": member.name,
                    "network.listen": [member.address.partition("/p2p/")[0]],
                    "log.format": "json",
                    **({"serve.memory": memory.pop(0)} if member.serves else {}),
                    **dict(plan.settings),
                },
            )
        init_network(members[0].folder, "harness", node_name=members[0].name)
        mesh.save()
        return mesh

    @classmethod
    def open(cls, folder: Path) -> Mesh:
        """The mesh of a folder. Raises HarnessError when there is none."""
        try:
            document = json.loads((folder / FILE).read_text(encoding="utf-8"))
            members = [
                Member(
                    name=entry["name"],
                    folder=Path(entry["data"]),
                    peer_id=entry["peer_id"],
                    address=entry["addresses"][0],
                    serves=entry["serves"],
                    program=tuple(entry.get("program", ())),
                    pid=entry["pid"],
                    started=entry["started"],
                    api_url=entry.get("api_url") or "",
                )
                for entry in document["nodes"]
            ]
        except FileNotFoundError:
            raise HarnessError(
                f"there is no mesh in {folder}; make one with: meshnode harness up --nodes 3 --dir {folder}"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise HarnessError(f"{folder / FILE} can't be read ({error!r}); remove the folder") from error
        return cls(folder, members)

    def save(self) -> None:
        """Write mesh.json. Raises DiskError."""
        nodes = [
            {
                "name": member.name,
                "peer_id": member.peer_id,
                "pid": member.pid,
                "pids": [process.pid for process in member.processes()],
                "data": str(member.folder),
                "addresses": [member.address],
                "api_url": member.api_url or None,
                "serves": member.serves,
                "program": member.program,
                "started": member.started,
                "log": str(member.log),
            }
            for member in self.members
        ]
        path = self.folder / FILE
        fresh = path.with_suffix(".new")
        try:
            fresh.write_text(json.dumps({"version": 1, "nodes": nodes}, indent=2), encoding="utf-8")
            fresh.replace(path)
        except OSError as error:
            raise DiskError(f"{path} can't be written: {error.strerror or error}") from error

    def member(self, name: str) -> Member:
        """By name or peer id, in full or as `status` shows it. Raises HarnessError for an unknown one."""
        for member in self.members:
            if name in (member.name, member.peer_id, short(PeerId(member.peer_id))):
                return member
        raise HarnessError(f"there is no node {name}; there are {', '.join(m.name for m in self.members)}")

    def has_model(self) -> bool:
        """Whether a node of this mesh has published or served a model."""
        for member in self.serving:
            with Database(Paths(member.folder).state) as database:
                if releases.known(database):
                    return True
        return False

    @property
    def serving(self) -> list[Member]:
        """All but the bootstrap peer."""
        return [member for member in self.members if member.serves]

    # ------------------------------------------------------------ running

    def up(self) -> None:
        """Start every node that does not run; new ones join first. Returns when all answer.

        Raises HarnessError, with the nodes that were started here stopped again.
        """
        began = time.monotonic()
        with ExitStack() as undo:
            founder, *others = self.members
            new = [member for member in others if not has_network(member.folder)]
            first = [founder] if new else self.members
            self._launch(first, undo)
            for member in first:
                member.wait_answers()
            if new:
                self._join(founder, new)
                self._launch(others, undo)
                for member in others:
                    member.wait_answers()
            undo.pop_all()
        self.cold_start_s = time.monotonic() - began
        self.save()

    def _launch(self, members: Sequence[Member], undo: ExitStack) -> None:
        for member in members:
            if member.process() is None:
                member.launch()
                undo.callback(member.wait_stopped)
                undo.callback(member.stop)
        self.save()

    def add(self, memory: str, settings: Sequence[tuple[str, object]] = ()) -> Member:
        """One more node, made, joined and started. Raises HarnessError, DiskError, ConfigError."""
        name = f"node{1 + len(self.serving)}"
        data = self.folder / name
        Paths(data).create()
        peer = open_identity(data).peer_id
        (port,) = free_ports(1)
        member = Member(name, data, peer, f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}")
        keep_settings(
            data,
            {
                "node.name": name,
                "network.listen": [f"/ip4/127.0.0.1/tcp/{port}"],
                "log.format": "json",
                "serve.memory": memory,
                **dict(settings),
            },
        )
        self._join(self.members[0], [member])
        self.members.append(member)
        with ExitStack() as undo:
            self._launch([member], undo)
            member.wait_answers()
            undo.pop_all()
        return member

    def down(self) -> None:
        """Stop every node, all at the same time, and wait until they have ended."""
        for member in self.members:
            member.stop()
        for member in self.members:
            member.wait_stopped()
        self.save()

    def wait_ready(self, seconds: float = 120.0) -> None:
        """Until the chain has answered a probe token of every serving node. Raises HarnessError."""
        ends = time.monotonic() + seconds
        for member in self.serving:
            member.wait_ready(max(1.0, ends - time.monotonic()))

    # ------------------------------------------------------------ parts

    def _give_model(self, published: Path, variant: str) -> Manifest:
        """Put a published model into the store of the first serving node, signed by it."""
        member = self.serving[0]
        identity = Identity.load(member.folder)
        store = BlobStore(Paths(member.folder).content, QUOTA_BYTES)
        try:
            cid, manifest = release(
                published, store, identity.signing_key, created_ms=wall_ms(), publisher=identity.peer_id
            )
        finally:
            store.close()
        self._serve_at_start(member, cid, variant)
        return manifest

    def _serve_at_start(self, member: Member, manifest: Cid, variant: str) -> None:
        with Database(Paths(member.folder).state) as database:
            releases.remember(database, manifest, variant)
            releases.serve_later(database, manifest, variant)

    def _memory(self, plan: Plan, manifest: Manifest | None) -> list[object]:
        if plan.memory:
            return list(plan.memory if len(plan.memory) == plan.nodes else plan.memory * plan.nodes)
        if manifest is None:
            return ["1GB"] * plan.nodes
        return [tight_memory(facts_of(manifest, plan.variant), plan.nodes)] * plan.nodes

    def _join(self, founder: Member, members: Sequence[Member]) -> None:
        """Redeem a ticket of the founder for each, with the real command."""
        with Database(Paths(founder.folder).state) as state:
            network = load_network(founder.folder)
            ticket = create_invite(network, state, uses=0, ttl_s=TICKET_S, addresses=[founder.address])
        command = [sys.executable, "-P", "-m", "meshnode", "join", "-", "--data"]
        running = [
            subprocess.Popen(
                [*command, str(member.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                env=clean_environment(),
            )
            for member in members
        ]
        failed = []
        for member, child in zip(members, running, strict=True):
            try:
                _, errors = child.communicate(ticket, timeout=JOIN_S)
            except subprocess.TimeoutExpired:
                child.kill()
                _, errors = child.communicate()
                errors += f"no end within {JOIN_S:.0f} s"
            if child.returncode != 0:
                failed.append(f"{member.name} could not join: {errors.strip()}")
        if failed:
            raise HarnessError("; ".join(failed))
        for member in members:
            own(founder.folder, member)


def own(founder: Path, member: Member) -> None:
    """Make a member a founder's device, with every role: all nodes of a harness are one owner's own.

    `founder`: the data folder of the node that made the network.
    """
    key, membership = load_founder(founder), load_network(member.folder)
    assert key is not None, f"{founder} did not make this network"
    certificate = Certificate(
        network=membership.network_id, peer=member.peer_id, roles=ROLES, issued_ms=wall_ms(), serial=1
    )
    save_network(member.folder, replace(membership, chain=(sign_certificate(key, certificate),)))


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback interface that are free now. A node that finds its port taken says so."""
    with ExitStack() as held:
        ports = []
        for _ in range(count):
            probe = held.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            ports.append(int(probe.getsockname()[1]))
        return ports


def remove(folder: Path) -> None:
    """Delete a mesh that does not run. Raises HarnessError when a node still runs."""
    mesh = Mesh.open(folder)
    alive = [member.name for member in mesh.members if member.process() is not None]
    if alive:
        raise HarnessError(f"{', '.join(alive)} still run; stop them with: meshnode harness down --dir {folder}")
    shutil.rmtree(folder)
