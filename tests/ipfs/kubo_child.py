"""A process that runs a real Kubo out of its shared library: a JSON command per line in, an answer per line out.

Its calls block for as long as they like and survive SIGTERM; whoever started it ends it with SIGKILL.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path


class Kubo:
    """One repository and the node that runs on it."""

    def __init__(self, library: Path, repository: Path) -> None:
        self._lib = ctypes.CDLL(str(library))
        self._repo = str(repository).encode()
        self._path = repository
        for name, arguments in (
            ("GetNodeID", [ctypes.c_char_p]),
            ("GetNodeMultiAddrs", [ctypes.c_char_p]),
            ("AddFile", [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_bool]),
            ("ListPeers", [ctypes.c_char_p]),
        ):
            function = getattr(self._lib, name)
            function.restype, function.argtypes = ctypes.c_void_p, arguments

    def start(self, routing: str, swarm_key: str) -> None:
        """On one loopback port: no other peers, no mDNS, no relays.

        routing: `none`, or `dht` to be a server of the DHT. swarm_key: the text of that file of a private network.
        """
        self._lib.CreateRepo(self._repo)
        path = self._path / "config"
        config = json.loads(path.read_text())
        config["Bootstrap"] = []
        config["Addresses"]["Swarm"] = ["/ip4/127.0.0.1/tcp/0"]
        config["Discovery"]["MDNS"]["Enabled"] = False
        config["Swarm"]["DisableNatPortMap"] = True
        config["Swarm"]["RelayClient"] = {"Enabled": False}
        config["Swarm"]["RelayService"] = {"Enabled": False}
        config["Routing"]["Type"] = routing
        config["AutoNAT"] = {"ServiceMode": "disabled"}
        path.write_text(json.dumps(config))
        if swarm_key:
            (self._path / "swarm.key").write_text(swarm_key)
        if self._lib.RunNode(self._repo) != 1:
            raise SystemExit("Kubo did not start")

    def _text(self, name: str, *arguments: object) -> str:
        pointer = getattr(self._lib, name)(self._repo, *arguments)
        return ctypes.string_at(pointer).decode() if pointer else ""

    def addresses(self) -> list[str]:
        peer = self._text("GetNodeID")
        return [f"{address}/p2p/{peer}" for address in json.loads(self._text("GetNodeMultiAddrs"))]

    def peers(self) -> str:
        return self._text("ListPeers")

    def add(self, path: str) -> str:
        """CIDv0 with dag-pb leaves of 256 KiB, the default of Kubo."""
        return self._text("AddFile", path.encode(), False)

    def get(self, cid: str, path: str) -> int:
        """0 when the whole file was fetched and written."""
        return int(self._lib.Download(self._repo, cid.encode(), path.encode()))

    def pin(self, cid: str) -> int:
        """Fetches and keeps everything that can be reached from this block: 0 when all of it is here."""
        return int(self._lib.PinCID(self._repo, cid.encode()))

    def connect(self, address: str) -> int:
        return int(self._lib.ConnectToPeer(self._repo, address.encode()))


def main() -> None:
    kubo = Kubo(Path(sys.argv[1]), Path(sys.argv[2]))
    kubo.start(*sys.argv[3:])
    print(json.dumps(kubo.addresses()), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(kubo, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
