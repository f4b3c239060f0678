"""Processes of service modules that a dead agent left behind: ended before the module is started again.

A module sees the end of its control line and stops by itself, so mostly there is only something to wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from pathlib import Path

from instar.host import processes

KILL_WITHIN_S = 5.0

log = logging.getLogger("instar.agent")


async def end_stray(path: Path, boot_id: str, grace_s: float) -> str:
    """End the process that the record at `path` names, if it lives: TERM, then KILL of its whole group after
    `grace_s`. Returns 'gone', 'stopped' or 'killed'; one that even KILL does not end is logged and left.
    """
    process = processes.recorded(path)
    pidfd = processes.open_pidfd(process, boot_id) if process else None
    how = "gone"
    if process is not None and pidfd is not None:
        try:
            how = await _end(pidfd, process.pid, grace_s)
        finally:
            os.close(pidfd)
        log.warning(
            "a process %d of the agent before was found at %s: %s", process.pid, path.parent.name, how
        )
    with contextlib.suppress(OSError):
        os.unlink(path)
    return how


async def _end(pidfd: int, pid: int, grace_s: float) -> str:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    if await _gone(pidfd, grace_s):
        return "stopped"
    # It lives, and leads a session of its own: the group's number is its pid and nobody else's.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    return "killed" if await _gone(pidfd, KILL_WITHIN_S) else "not ended by SIGKILL"


async def _gone(pidfd: int, within_s: float) -> bool:
    if processes.wait_gone(pidfd, 0):
        return True
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        async with asyncio.timeout(within_s):
            await gone.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True
