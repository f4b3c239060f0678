"""Watch over the updater's trial: each line is the other's watcher.

Only while the updater's line has a trial record, the launcher's oldest copy is asked to end a trial
whose lease is over. The agent itself decides and changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

EVERY_S = 15.0
CHILD_WITHIN_S = 60.0

log = logging.getLogger("instar.agent")


async def watch_updater(trial: Path, command: list[str], every_s: float = EVERY_S) -> None:
    """Until cancelled. `command` is `guard updater` of the launcher's copy."""
    failed = ""
    while True:
        await asyncio.sleep(every_s)
        if not trial.exists():
            continue
        from instar.agent.children import run_child  # seldom needed

        try:
            outcome = await run_child(command, b"", CHILD_WITHIN_S, 65_536)
            words = outcome.stderr.strip()[-300:]
        except OSError as error:
            words = str(error)
        if words and words != failed:
            log.warning("the updater's trial: %s", words)
        failed = words
