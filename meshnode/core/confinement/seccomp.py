"""A seccomp filter (Linux): the calls that a computing process makes, and no other.

What it may do: compute with the memory it has, wait, start threads, and talk over what is open. What is not listed
fails: new processes, sockets, files (unless asked for), signals to others, debugging, mounting, shared memory,
memory that holds new code. Two processors are known, x86-64 and ARM64.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from dataclasses import dataclass
from typing import Final

_SET_MODE_FILTER: Final = 1
_ALL_THREADS: Final = 1  # SECCOMP_FILTER_FLAG_TSYNC
_ALLOW, _ERRNO, _KILL = 0x7FFF_0000, 0x0005_0000, 0x8000_0000
_NEWER: Final = 424  # calls from here on have one number on all processors; C libraries try them and fall back
_X32: Final = 0x4000_0000  # calls of the x32 interface have this bit

# <linux/bpf_common.h>: load a word, compare, test bits, return
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06

_CLONE_THREAD: Final = 0x0001_0000
_PROT_EXEC: Final = 0x4
_MAP_SHARED, _MAP_ANONYMOUS = 0x01, 0x20
_AT_EMPTY_PATH: Final = 0x1000
_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_SET_NAME, _GET_NAME, _NAME_MEMORY = 15, 16, 0x53564D41  # of prctl
_FCNTL: Final = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class _Processor:
    audit: int  # AUDIT_ARCH_... of <linux/audit.h>
    numbers: dict[str, int]


# <asm/unistd_64.h>
_X86_64: Final = _Processor(
    0xC000_003E,
    {
        "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
        "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
        "rt_sigreturn": 15, "ioctl": 16, "pread64": 17, "readv": 19, "writev": 20, "access": 21, "select": 23,
        "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "nanosleep": 35, "getpid": 39, "sendto": 44,
        "recvfrom": 45, "shutdown": 48, "getsockname": 51, "getpeername": 52, "getsockopt": 55, "clone": 56,
        "exit": 60, "uname": 63, "fcntl": 72, "getdents": 78, "getcwd": 79, "readlink": 89, "gettimeofday": 96,
        "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104,
        "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131, "statfs": 137, "fstatfs": 138,
        "sched_getparam": 143, "sched_getscheduler": 145, "sched_get_priority_max": 146,
        "sched_get_priority_min": 147, "prctl": 157, "gettid": 186, "time": 201, "futex": 202,
        "sched_getaffinity": 204, "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228,
        "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "tgkill": 234, "openat": 257,
        "newfstatat": 262, "getdents64": 217, "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271,
        "set_robust_list": 273, "get_robust_list": 274, "prlimit64": 302, "getcpu": 309, "getrandom": 318,
        "seccomp": 317, "membarrier": 324, "statx": 332, "rseq": 334,
    },
)  # fmt: skip
# <asm-generic/unistd.h>: calls that are missing here are done by others
_ARM64: Final = _Processor(
    0xC000_00B7,
    {
        "getcwd": 17, "dup": 23, "fcntl": 25, "ioctl": 29, "statfs": 43, "fstatfs": 44, "faccessat": 48,
        "openat": 56, "close": 57, "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65,
        "writev": 66, "pread64": 67, "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79, "fstat": 80,
        "exit": 93, "exit_group": 94, "set_tid_address": 96, "futex": 98, "set_robust_list": 99,
        "get_robust_list": 100, "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114,
        "clock_nanosleep": 115, "sched_getscheduler": 120, "sched_getparam": 121, "sched_getaffinity": 123,
        "sched_yield": 124, "sched_get_priority_max": 125, "sched_get_priority_min": 126, "restart_syscall": 128,
        "tgkill": 131, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139,
        "times": 153, "uname": 160, "getrlimit": 163, "getrusage": 165, "prctl": 167, "getcpu": 168,
        "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176,
        "getegid": 177, "gettid": 178, "sysinfo": 179, "getsockname": 204, "getpeername": 205, "sendto": 206,
        "recvfrom": 207, "getsockopt": 209, "shutdown": 210, "brk": 214, "munmap": 215, "mremap": 216,
        "clone": 220, "mmap": 222, "mprotect": 226, "madvise": 233, "prlimit64": 261, "seccomp": 277,
        "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293,
    },
)  # fmt: skip
_PROCESSORS: Final = {"x86_64": _X86_64, "aarch64": _ARM64}

_ALWAYS: Final = """
    read write readv writev pread64 close fstat lseek munmap mremap brk madvise futex sched_yield
    rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall exit exit_group
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times
    getpid getppid gettid getuid geteuid getgid getegid getcwd uname sysinfo getrusage getrlimit getcpu
    set_tid_address set_robust_list get_robust_list rseq membarrier getrandom
    sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min
    poll ppoll select pselect6 sendto recvfrom shutdown getsockname getpeername getsockopt dup
"""
_LOOKING_AT_FILES: Final = """
    stat lstat newfstatat statx access faccessat readlink readlinkat getdents getdents64 statfs fstatfs
"""

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


class _Filter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Filter)))


def known_processor() -> bool:
    """Whether there is a filter for this machine."""
    return sys.platform == "linux" and platform.machine() in _PROCESSORS and sys.maxsize > 1 << 32


def restrict(*, files: bool) -> bool:
    """Have the kernel refuse what is not listed, for all threads, for good. Wants no_new_privs.

    Args:
      files: files may be opened for reading; else none at all can be opened or looked for.

    Returns False where there is no filter for this machine. Raises OSError when the kernel has no seccomp.
    """
    if not known_processor():
        return False
    processor = _PROCESSORS[platform.machine()]
    instructions = program(processor, files=files, pid=os.getpid())
    filters = (_Filter * len(instructions))(*(_Filter(*instruction) for instruction in instructions))
    call = _Program(len(instructions), filters)
    number = processor.numbers["seccomp"]
    if _LIBC.syscall(number, _SET_MODE_FILTER, _ALL_THREADS, ctypes.byref(call)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"seccomp: {os.strerror(code)}")
    return True


def program(processor: _Processor, *, files: bool, pid: int) -> list[Instruction]:
    """The filter, an instruction a tuple."""
    number = processor.numbers
    out: list[Instruction] = [
        (_LOAD, 0, 0, 4),  # the processor that the call was made for
        (_EQUAL, 1, 0, processor.audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number of the call
        (_AT_LEAST, 0, 1, _X32),
        _refuse(errno.ENOSYS),
    ]

    def rule(name: str, *body: Instruction) -> None:
        if name in number:
            out.extend(((_EQUAL, 0, len(body), number[name]), *body))

    for name in (_ALWAYS + (_LOOKING_AT_FILES if files else "")).split():
        rule(name, _allow())
    # one thread more, no process; clone3, whose flags can't be seen from here, does not exist
    rule("clone", _argument(0), (_ANY_BIT, 0, 1, _CLONE_THREAD), _allow(), _refuse(errno.EPERM))
    rule(
        "mmap",
        _argument(2),
        (_ANY_BIT, 4, 0, _PROT_EXEC),  # new code
        _argument(3),
        (_ANY_BIT, 0, 1, _MAP_SHARED),
        (_ANY_BIT, 1, 0, _MAP_ANONYMOUS),  # memory that RLIMIT_DATA does not count
        _allow(),
        _refuse(errno.EPERM),
    )
    rule("mprotect", _argument(2), (_ANY_BIT, 1, 0, _PROT_EXEC), _allow(), _refuse(errno.EPERM))
    rule("tgkill", _argument(0), (_EQUAL, 0, 1, pid), _allow(), _refuse(errno.EPERM))
    rule("fcntl", _argument(1), *_one_of(_FCNTL))
    rule("prctl", _argument(0), *_one_of((_SET_NAME, _GET_NAME, _NAME_MEMORY)))
    rule("ioctl", _refuse(errno.ENOTTY))
    # limits can be read, not set: no address of new ones
    rule(
        "prlimit64",
        _argument(2),
        (_EQUAL, 0, 3, 0),
        _argument(2, high=True),
        (_EQUAL, 0, 1, 0),
        _allow(),
        _refuse(errno.EPERM),
    )
    if files:
        rule("open", _argument(1), (_ANY_BIT, 1, 0, _WRITING), _allow(), _refuse(errno.EACCES))
        rule("openat", _argument(2), (_ANY_BIT, 1, 0, _WRITING), _allow(), _refuse(errno.EACCES))
    else:
        for name in ("open", "openat", "stat", "lstat", "access", "faccessat", "readlink", "readlinkat"):
            rule(name, _refuse(errno.EACCES))
        # of an open file only, which is how C libraries do fstat
        rule("newfstatat", _argument(3), (_ANY_BIT, 0, 1, _AT_EMPTY_PATH), _allow(), _refuse(errno.EACCES))
        rule("statx", _argument(2), (_ANY_BIT, 0, 1, _AT_EMPTY_PATH), _allow(), _refuse(errno.EACCES))
    out += [(_AT_LEAST, 0, 1, _NEWER), _refuse(errno.ENOSYS), _refuse(errno.EPERM)]
    return out


def _allow() -> Instruction:
    return (_RETURN, 0, 0, _ALLOW)


def _refuse(code: int) -> Instruction:
    return (_RETURN, 0, 0, _ERRNO | code)


def _argument(index: int, *, high: bool = False) -> Instruction:
    """Load the low or high half of an argument; both processors are little endian."""
    return (_LOAD, 0, 0, 16 + 8 * index + 4 * high)


def _one_of(values: tuple[int, ...]) -> list[Instruction]:
    """Allow the loaded word if it is one of these."""
    return [i for value in values for i in ((_EQUAL, 0, 1, value), _allow())] + [_refuse(errno.EPERM)]
