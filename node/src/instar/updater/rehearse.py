"""The updater's rehearsal: read what it would have to go on with, then take the server's test job.

It changes nothing. The test job goes the whole way: channel, runner process, module, reply.
"""

from __future__ import annotations

import sys

from instar.core.errors import InputError, ReleaseError
from instar.engine.journal import Journals
from instar.host import trials
from instar.host.children import run
from instar.host.clock import Clock
from instar.host.layout import LINES, Layout
from instar.host.line import Line
from instar.host.program import Program
from instar.host.records import read_config, read_node


def rehearse(layout: Layout, program: Program, tx: str, within_s: float) -> int:
    """0 when it could take over here. Raises InstarError; its own transaction must be readable to it."""
    read_node(layout)
    try:
        read_config(layout)
    except InputError as error:
        print(f"instar updater: {error.text}", file=sys.stderr)  # would run on the defaults
    for role in LINES:
        trials.read(Line(layout.line(role)))
    known = {journal.progress.begin.tx for journal in Journals(layout.journal, Clock()).read_all()}
    if tx not in known:
        text = f"cannot rehearse: this release cannot read the journal of {tx}"
        raise ReleaseError("journal-unreadable", text)
    ended = run(
        program.command(
            "agent", "--rehearse", "--state", str(layout.state), "--tx", tx, "--within", f"{within_s:g}"
        ),
        within_s,
    )
    sys.stderr.write(ended.stderr)
    if ended.late:
        print(ended.describe("the rehearsal's job"), file=sys.stderr)
    return 1 if ended.late else ended.status if ended.status >= 0 else 1
