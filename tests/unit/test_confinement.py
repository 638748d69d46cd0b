"""A confined process: what it can't do any more, what it still can, and the filter instruction by instruction."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from meshnode.core.confinement import landlock, seccomp
from meshnode.core.confinement.confine import ALL, FILES, MEMORY, NETWORK, PROCESSES, RIGHTS
from meshnode.core.confinement.environment import child_environment

linux = pytest.mark.skipif(sys.platform != "linux", reason="Landlock, seccomp and these limits are Linux's")
filtered = pytest.mark.skipif(not seccomp.known_processor(), reason="there is no filter for this processor")
has_landlock = pytest.mark.skipif(not landlock.abi(), reason="this kernel has no Landlock")

PRELUDE = """
import ctypes, json, mmap, os, resource, signal, socket, subprocess, sys, threading, time
from pathlib import Path
from meshnode.core.confinement import confine as module, landlock, seccomp
from meshnode.core.confinement.confine import confine, libraries_only
libc = ctypes.CDLL(None, use_errno=True)
outside, inside = Path(sys.argv[1]), Path(sys.argv[2])
opened = outside.open("rb")

def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result

def attempt(what):
    try:
        what()
    except BaseException as error:
        return type(error).__name__
    return ""
"""


def run(tmp_path: Path, body: str) -> dict[str, object]:
    """Run a program in a process of its own, from a folder with a secret; gives the JSON that it prints."""
    outside, inside = tmp_path / "secret", tmp_path / "given"
    outside.write_bytes(b"secret")
    inside.write_bytes(b"given")
    program = PRELUDE + textwrap.dedent(body)
    result = subprocess.run(
        [sys.executable, "-P", "-c", program, str(outside), str(inside)],
        cwd=tmp_path,
        env=child_environment(os.environ),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    answer: dict[str, object] = json.loads(result.stdout)
    return answer


ATTEMPTS = {
    "open": "outside.open()",
    "open a library": "open(os.__file__)",
    "open below the old folder": "open('secret')",
    "write": "outside.open('w')",
    "make a file": "(inside.parent / 'made').touch()",
    "make a file here": "open('made', 'w')",
    "look for a file": "os.stat(outside)",
    "list": "os.listdir('/')",
    "fork": "os.fork()",
    "start a program": "subprocess.run(['/bin/true'])",
    "become a program": "os.execv('/bin/true', ['true'])",
    "tcp": "socket.socket()",
    "udp": "socket.socket(type=socket.SOCK_DGRAM)",
    "unix socket": "socket.socket(socket.AF_UNIX)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "socket pair": "socket.socketpair()",
    "signal to the parent": "os.kill(os.getppid(), 0)",
    "signal to a thread of the parent": "call(libc.tgkill(os.getppid(), os.getppid(), 0))",
    "debug the parent": "call(libc.ptrace(16, os.getppid(), 0, 0))",
    "read the parent's memory": "call(libc.process_vm_readv(os.getppid(), 0, 0, 0, 0, 0))",
    "mount": "call(libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0))",
    "new namespace": "call(libc.unshare(0x10000000))",
    "handle of a file": "call(libc.open_by_handle_at(-100, 0, 0))",
    "keyring": "call(libc.syscall(250, 0, 0, 0, 0, 0))",
    "memory that nobody counts": "mmap.mmap(-1, 4096)",
    "memory in a file": "os.memfd_create('x')",
    "new code": "mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE, prot=7)",
    "more memory than was promised": "bytearray(1 << 28)",
    "larger limits": "resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, 1 << 40))",
    "limits of the parent": "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (9, 9))",
    "slow the parent down": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "pin the parent": "os.sched_setaffinity(os.getppid(), {0})",
    "outlive the parent": "call(libc.prctl(1, 0, 0, 0, 0))",
    "another user": "os.setuid(1)",
}
GOES_ON = {
    "read what is open": "assert opened.read() == b'secret'",
    "map what is open": "mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)",
    "memory that was promised": "bytearray(1 << 25)",
    "threads": "t = threading.Thread(target=int); t.start(); t.join()",
    "sleep": "time.sleep(0.001)",
    "talk over what is open": "left.sendall(b'x'); assert right.recv(1) == b'x'",
    "clocks": "time.monotonic(), time.time()",
    "chance": "os.urandom(8)",
    "collect": "import gc; gc.collect()",
}


@linux
@filtered
def test_what_a_confined_process_can_do(tmp_path: Path) -> None:
    answer = run(
        tmp_path,
        f"""
        import gc
        left, right = socket.socketpair()
        held = confine(memory_bytes=1 << 26)
        refused = {{name: attempt(lambda: eval(text)) for name, text in {ATTEMPTS!r}.items()}}
        def go(text):
            exec(text, globals())
        allowed = {{name: attempt(lambda: go(text)) for name, text in {GOES_ON!r}.items()}}
        print(json.dumps({{"held": held.parts, "missing": held.missing, "refused": refused, "allowed": allowed}}))
        """,
    )
    assert answer["held"] == list(ALL) and answer["missing"] == []
    assert [name for name, error in answer["refused"].items() if not error] == []  # type: ignore[attr-defined]
    assert answer["allowed"] == dict.fromkeys(GOES_ON, "")
    assert (tmp_path / "secret").read_bytes() == b"secret" and not (tmp_path / "made").exists()


@linux
@filtered
@has_landlock
@pytest.mark.parametrize("switched_off", ["landlock", "seccomp", "neither"])
def test_only_what_is_readable(tmp_path: Path, switched_off: str) -> None:
    """Files that are named can be read, others not: by Landlock. Without it that is said."""
    answer = run(
        tmp_path,
        f"""
        if {switched_off!r} == "landlock":
            landlock.abi = lambda: 0
        if {switched_off!r} == "seccomp":
            seccomp.known_processor = lambda: False
        held = confine(memory_bytes=1 << 26, readable=[inside])
        print(json.dumps({{
            "held": held.parts,
            "inside": attempt(lambda: inside.read_bytes()),
            "outside": attempt(lambda: outside.read_bytes()),
            "library": attempt(lambda: open(os.__file__)),
            "writing": attempt(lambda: inside.open("r+")),
            "made": attempt(lambda: (inside.parent / "made").touch()),
        }}))
        """,
    )
    assert answer["inside"] == ""
    assert answer["writing"] == answer["made"] == "PermissionError"
    closed = "" if switched_off == "landlock" else "PermissionError"
    assert answer["outside"] == answer["library"] == closed
    wanted = {"landlock": {FILES}, "seccomp": {NETWORK, PROCESSES}, "neither": set()}[switched_off]
    assert set(ALL) - set(answer["held"]) == wanted  # type: ignore[call-overload]


@linux
@filtered
def test_without_landlock_nothing_can_be_opened_either(tmp_path: Path) -> None:
    """Many kernels of containers have seccomp alone."""
    answer = run(
        tmp_path,
        """
        landlock.abi = lambda: 0
        held = confine(memory_bytes=1 << 26)
        print(json.dumps({"held": held.parts, "outside": attempt(lambda: outside.read_bytes())}))
        """,
    )
    assert answer == {"held": list(ALL), "outside": "PermissionError"}


@linux
@has_landlock
def test_libraries_first(tmp_path: Path) -> None:
    """After the first step modules can be imported, and nothing else be read, by threads neither."""
    answer = run(
        tmp_path,
        """
        libraries_only()
        import wave
        def in_thread(what):
            out = []
            thread = threading.Thread(target=lambda: out.append(attempt(what)))
            thread.start()
            thread.join()
            return out[0]
        found = {"outside": attempt(outside.read_bytes), "thread": in_thread(outside.read_bytes)}
        held = confine(memory_bytes=1 << 26)
        found["library"] = attempt(lambda: open(os.__file__))
        print(json.dumps({**found, "held": held.parts, "folder": attempt(Path.cwd)}))
        """,
    )
    denied = dict.fromkeys(("outside", "thread", "library"), "PermissionError")
    assert {**answer, "held": None} == {**denied, "held": None, "folder": "FileNotFoundError"}
    assert {MEMORY, RIGHTS, FILES} <= set(answer["held"])  # type: ignore[call-overload]


def test_the_environment_holds_no_secret() -> None:
    given = {
        "PYTHONPATH": "near",
        "MESHNODE_PASSPHRASE": "s",
        "AWS_SECRET_ACCESS_KEY": "s",
        "HOME": "/home/x",
        "LANG": "C.UTF-8",
        "PATH": "/",
    }
    made = child_environment(given)
    assert made["LANG"] == "C.UTF-8"
    assert made["PYTHONPATH"].endswith(f"{os.pathsep}{Path.cwd() / 'near'}")
    assert "s" not in made.values() and not {"HOME", "PATH"} & made.keys()


# ---------------------------------------------------------------- the filter


def judge(processor: str, call: str | int, *arguments: int, files: bool = False, audit: int = 0) -> int:
    """What the filter answers: the kernel's classic BPF, as far as it is used here."""
    known = seccomp._PROCESSORS[processor]
    number = call if isinstance(call, int) else known.numbers[call]
    words = {0: number, 4: audit or known.audit}
    for index, value in enumerate((*arguments, *[0] * (6 - len(arguments)))):
        words |= {16 + 8 * index: value & 0xFFFF_FFFF, 20 + 8 * index: value >> 32}
    program, at, word = seccomp.program(known, files=files, pid=77), 0, 0
    while True:
        code, yes, no, operand = program[at]
        at += 1
        match code:
            case seccomp._LOAD:
                word = words[operand]
            case seccomp._RETURN:
                return operand
            case seccomp._EQUAL:
                at += yes if word == operand else no
            case seccomp._AT_LEAST:
                at += yes if word >= operand else no
            case seccomp._ANY_BIT:
                at += yes if word & operand else no


def refusal(code: int) -> int:
    return seccomp._ERRNO | code


@pytest.mark.parametrize("processor", seccomp._PROCESSORS)
def test_the_filter(processor: str) -> None:
    """On every processor, also on those that this machine is not."""
    allow, no = seccomp._ALLOW, refusal(errno.EPERM)
    assert judge(processor, "read") == judge(processor, "futex") == judge(processor, "exit_group") == allow
    assert judge(processor, "read", audit=3) == seccomp._KILL
    assert judge(processor, 0x4000_0000) == refusal(errno.ENOSYS)  # x32
    assert judge(processor, 435) == judge(processor, 425) == refusal(errno.ENOSYS)  # clone3, io_uring_setup
    thread, fork = 0x3D0F00, 0x1200011
    assert judge(processor, "clone", thread) == allow and judge(processor, "clone", fork) == no
    private, shared, anonymous = 2, 1, 0x20
    assert judge(processor, "mmap", 0, 4096, 3, private | anonymous) == allow
    assert judge(processor, "mmap", 0, 4096, 1, shared) == allow
    assert judge(processor, "mmap", 0, 4096, 3, shared | anonymous) == no
    assert judge(processor, "mmap", 0, 4096, 5, private) == no
    assert judge(processor, "mprotect", 0, 4096, 3) == allow and judge(processor, "mprotect", 0, 4096, 5) == no
    assert judge(processor, "tgkill", 77, 1, 6) == allow and judge(processor, "tgkill", 78, 78, 9) == no
    assert judge(processor, "prlimit64", 0, 7, 0, 1) == allow
    assert judge(processor, "prlimit64", 0, 7, 1 << 32) == judge(processor, "prlimit64", 0, 7, 8) == no
    assert judge(processor, "fcntl", 3, 1030) == allow and judge(processor, "fcntl", 3, 8) == no  # F_SETOWN
    assert judge(processor, "prctl", 15) == allow and judge(processor, "prctl", 1) == no
    assert judge(processor, "ioctl", 0, 0x5401) == refusal(errno.ENOTTY)
    denied = refusal(errno.EACCES)
    assert judge(processor, "openat", -100 & (1 << 64) - 1, 0, os.O_RDONLY) == denied
    assert judge(processor, "openat", 0, 0, os.O_CLOEXEC, files=True) == allow
    assert judge(processor, "openat", 0, 0, os.O_WRONLY, files=True) == denied
    assert judge(processor, "newfstatat", 3, 0, 0, 0x1000) == allow
    assert judge(processor, "newfstatat", 3, 0, 0, 0) == denied


@pytest.mark.parametrize("processor", seccomp._PROCESSORS)
@pytest.mark.parametrize("files", [False, True])
def test_nothing_slips_through(processor: str, files: bool) -> None:
    """Of all calls with arguments of zeros or ones, those that are allowed are among those that are listed."""
    known = seccomp._PROCESSORS[processor].numbers
    listed = set(known.values())
    for number in range(1000):
        for value in (0, (1 << 64) - 1):
            if judge(processor, number, *[value] * 6, files=files) == seccomp._ALLOW:
                assert number in listed
    assert len(seccomp.program(seccomp._PROCESSORS[processor], files=files, pid=1)) < 4096  # BPF_MAXINSNS


@linux
@has_landlock
@pytest.mark.parametrize("version", range(1, landlock.abi() + 1))
def test_every_version_of_landlock(version: int, tmp_path: Path) -> None:
    """As on kernels that know fewer rights: what they know, they are asked for, and files are closed."""
    answer = run(
        tmp_path,
        f"""
        landlock.abi = lambda: {version}
        seccomp.known_processor = lambda: False
        held = confine(memory_bytes=1 << 26, readable=[inside])
        tcp = socket.socket()
        print(json.dumps({{
            "abi": held.landlock,
            "inside": attempt(inside.read_bytes),
            "outside": attempt(outside.read_bytes),
            "write": attempt(lambda: outside.open("w")),
            "truncate": attempt(lambda: os.truncate(outside, 0)),
            "bind": attempt(lambda: tcp.bind(("127.0.0.1", 0))),
        }}))
        """,
    )
    denied = "PermissionError"
    assert answer == {
        "abi": version,
        "inside": "",
        "outside": denied,
        "write": denied,
        "truncate": denied if version >= 3 else "",
        "bind": denied if version >= 4 else "",
    }
