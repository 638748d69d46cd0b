"""A local network of our own: real nodes in network namespaces of their own, at one switch.

    with Lan.open(3) as lan:
        lan.start(member, 0)
        lan.unplug()          # the switch loses its power: every link dies, and no node sees more than silence
        lan.plug_in()
        lan.readdress(0, "10.77.9.1")

Needs Linux with user namespaces, and the commands unshare, nsenter (util-linux) and ip (iproute2); `why_not` says
what is missing. Nothing outside of the namespaces is changed.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psutil

from meshnode.harness.member import Member, clean_environment

PORT: Final = 4331
LISTEN: Final = f"/ip4/0.0.0.0/tcp/{PORT}"
SLEEP: Final = ("sleep", "infinity")
MAKE_S: Final = 10.0


def why_not() -> str:
    """Why there can be no such network here; empty when there can."""
    for program in ("unshare", "nsenter", "ip"):
        if shutil.which(program) is None:
            return f"the command {program} is missing"
    tried = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", "ip", "link", "add", "br0", "type", "bridge"],
        capture_output=True,
        text=True,
        timeout=MAKE_S,
    )
    return tried.stderr.strip().splitlines()[-1] if tried.returncode else ""


class Lan:
    """One switch with a cable to each of some machines."""

    def __init__(self, switch: subprocess.Popen[bytes], machines: list[subprocess.Popen[bytes]]) -> None:
        self._switch = switch
        self._machines = machines

    @classmethod
    @contextmanager
    def open(cls, machines: int) -> Iterator[Lan]:
        """A network of so many machines, at 10.77.0.1 and so on."""
        held: list[subprocess.Popen[bytes]] = []
        try:
            held.append(_hold("unshare", "--user", "--map-root-user", "--net"))
            lan = cls(held[0], [])
            lan._at(held[0], "ip link add br0 type bridge")
            lan.plug_in()
            for number in range(machines):
                machine = _hold(*_into(held[0]), "unshare", "--net")
                held.append(machine)
                lan._machines.append(machine)
                lan._at(held[0], f"ip link add v{number} type veth peer name eth0 netns {machine.pid}")
                lan._at(held[0], f"ip link set v{number} master br0 up")
                lan._at(machine, "ip link set lo up")
                lan._at(machine, "ip link set eth0 up")
                lan._at(machine, f"ip address add 10.77.0.{number + 1}/16 dev eth0")
            yield lan
        finally:
            for one in reversed(held):
                one.kill()
                one.wait()

    def unplug(self) -> None:
        """Packets get lost from now on; no interface of a machine shows it."""
        self._at(self._switch, "ip link set br0 down")

    def plug_in(self) -> None:
        self._at(self._switch, "ip link set br0 up")

    def readdress(self, machine: int, ip: str) -> None:
        """The machine has this address from now on, and no other."""
        self._at(self._machines[machine], "ip address flush dev eth0")
        self._at(self._machines[machine], f"ip address add {ip}/16 dev eth0")

    def talks_to(self, machine: int) -> set[str]:
        """The IPv4 addresses to which the machine has TCP connections."""
        table = self._at(self._machines[machine], "cat /proc/net/tcp").splitlines()[1:]
        rows = [line.split() for line in table]
        established = [row[2].partition(":")[0] for row in rows if row[3] == "01"]
        return {socket.inet_ntoa(bytes.fromhex(word)[::-1]) for word in established}  # little endian

    def start(self, member: Member, machine: int, **settings: str) -> None:
        """Run a node of a harness on a machine of this network. `settings`: SECTION__KEY="value" of this run."""
        with member.log.open("ab") as log:
            child = subprocess.Popen(
                [
                    *_into(self._machines[machine]),
                    *(sys.executable, "-P", "-m", "meshnode", "start"),
                    *("--data", str(member.folder), "--listen", LISTEN),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**clean_environment(), **{f"MESHNODE_{key}": value for key, value in settings.items()}},
                start_new_session=True,
            )
        member.pid = child.pid
        member.started = psutil.Process(child.pid).create_time()

    def _at(self, where: subprocess.Popen[bytes], command: str) -> str:
        done = subprocess.run(
            [*_into(where), *command.split()], check=True, capture_output=True, text=True, timeout=MAKE_S
        )
        return done.stdout


def _into(holder: subprocess.Popen[bytes]) -> list[str]:
    """The words before a command that runs in the namespaces of another process."""
    return ["nsenter", "--target", str(holder.pid), "--user", "--net", "--preserve-credentials"]


def _hold(*command: str) -> subprocess.Popen[bytes]:
    """A process that keeps the namespaces that a command makes; returns once it has made them."""
    holder = subprocess.Popen([*command, *SLEEP], stdin=subprocess.DEVNULL)
    ends = time.monotonic() + MAKE_S
    while psutil.Process(holder.pid).cmdline() != list(SLEEP):
        assert holder.poll() is None and time.monotonic() < ends, f"{command} made no namespace"
        time.sleep(0.01)
    return holder
