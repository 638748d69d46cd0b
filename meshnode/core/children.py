"""Child processes: waiting for their end, and telling how they ended."""

from __future__ import annotations

import os
import signal
import subprocess

import trio


async def exited(process: subprocess.Popen[bytes]) -> None:
    """Wait until a child has ended, and reap it. If cancelled: nothing has happened."""
    if process.poll() is not None:
        return
    if hasattr(os, "pidfd_open"):
        descriptor = os.pidfd_open(process.pid)
        try:
            await trio.lowlevel.wait_readable(descriptor)
        finally:
            os.close(descriptor)
        process.wait()
    else:
        await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)


def signal_name(number: int) -> str:
    """SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
