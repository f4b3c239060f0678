"""How this agent gets replaced: by a child of ours, while we go on until we are stopped; or by ourselves."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import NoReturn

from instar.host.interpreter import command
from instar.host.layout import Layout
from instar.host.program import Program

CYCLE_WITHIN_S = 10.0
POLL_S = 0.05


async def cycle(words: list[str], within_s: float = CYCLE_WITHIN_S) -> str:
    """Start the child that has the agent restarted (`instar cycle`), and wait to be stopped by it.

    Returns only when that does not happen: why not. The child is in a session of its own and outlives us;
    its words go where ours go.
    """
    try:
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, cwd="/", start_new_session=True)
    except OSError as error:
        return f"its child cannot be started: {error}"
    loop = asyncio.get_running_loop()
    end = loop.time() + within_s
    while loop.time() < end:
        if child.poll():
            return f"its child ended with status {child.returncode}"
        await asyncio.sleep(POLL_S)
    return f"it was not stopped within {within_s:g} s"


def become_launcher(layout: Layout, program: Program, options: list[str]) -> NoReturn:
    """Replace this process by the launcher, which chooses the release to run; by `program` where there is none.

    The process id stays, so whoever keeps us running sees nothing. `options` are those of the agent beside
    its state folder. Raises OSError.
    """
    state = str(layout.state)
    launch = command(layout.launcher, "launch", "agent", "--state", state, *options)
    again = program.command("agent", "--state", state, *options)
    words = launch if layout.launcher.exists() else again
    sys.stderr.flush()
    os.execv(words[0], words)
