"""Run a command in a network of its own, in which there is nothing but the loopback interface.

Where the system does not allow that (a container without user namespaces), the command runs in the usual network,
after a word about it: the daemons listen on 127.0.0.1 and know nobody else there either.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1  # linux/sockios.h, linux/if.h


def enter() -> None:
    """Give this process, and what it starts, a network of its own. Raises OSError."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


def possible() -> str:
    """Why it can't be done, found out by a child process: half of it would leave us without any network."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            enter()
        except OSError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as why:
        said = why.read()
    os.waitpid(child, 0)
    return said


def main() -> None:
    trouble = possible()
    if trouble:
        print(f"no network of its own for this test run ({trouble}); it uses the loopback interface", flush=True)
    else:
        enter()
        print("this test run has a network of its own with nothing but the loopback interface", flush=True)
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
