"""docs/kill-points.md: a section for each scenario; those that were run again are put in the old ones' places."""

from __future__ import annotations

from collections.abc import Sequence

from instar_lab.kills.courses import COURSES
from instar_lab.kills.scenario import SCENARIOS, Row

INTRO = """\
# Kill points

Made by `python -m instar_lab.kills.table` from real runs: a real server, and for each row a real node. The
process that reaches the point is ended by SIGKILL there, before or after the record or effect that the point
names.

- **kept**: the keeper starts again whatever died, and nothing else is done (a keeper that was itself killed
  is started again, and adopts what lives on).
- **started**: everything of the node is killed at that moment and the node is started again, as by a boot;
  then it is killed once more at the second point (if its recovery comes there), and started once more.

Updates of the node's own programs have a fresh node for each row. Such a row stands here only if, without any
other help, the node came to rest with exactly one agent and one updater, each the valid current release of its
line, every transaction at its end, and nothing else but the old or the new release running. A bad release never
stays.

The other scenarios go on with a node that rests. A row stands here only if, without any other help, one agent and
one updater ran at the end; of the service module exactly one process, a child of that agent, in the release that
`current` names and the journal explains, or none; no runner was left over; what the module was told was still
known to it; nothing that had ended was held back from the server. A restart had one end at the server, and that
was its success. A job's row got one end that stayed, and what the job did was done at most once, and once where
the row says `done`.
"""
HEAD = "| killed: role | at | recovery | killed again at | outcome |\n|---|---|---|---|---|\n"


def headings() -> dict[str, str]:
    """Scenario or course -> its heading, in the order of the document."""
    found = {s.name: f"## {s.name}: {', '.join(s.lines)} to {s.version}" for s in SCENARIOS}
    return {**found, **{course.name: f"## {course.name}: {course.about}" for course in COURSES}}


def document(old: str, ran: Sequence[str], rows: Sequence[Row]) -> str:
    """`old` with the sections of all that `ran` made anew from `rows`."""
    sections = {name: text for name, text in _sections(old).items() if name in headings()}
    sections |= {name: _section(name, [row for row in rows if row.scenario == name]) for name in ran}
    body = "\n".join(sections[name] for name in headings() if name in sections)
    count = sum(
        line.startswith("|") and not line.startswith(("| killed:", "|--")) for line in body.splitlines()
    )
    return f"{INTRO}\n{count} runs stand here.\n\n{body}"


def _sections(text: str) -> dict[str, str]:
    """Name -> section, with its heading."""
    found = {}
    for part in text.split("\n## ")[1:]:
        found[part.partition(":")[0]] = f"## {part.rstrip()}\n"
    return found


def _section(name: str, rows: Sequence[Row]) -> str:
    came = [row for row in rows if row.reached]
    points = len({row.point for row in came})
    parts = [f"{headings()[name]}\n\n{len(came)} runs at {points} points."]
    if absent := len(rows) - len(came):
        parts.append(f" {absent} more never came to their point, which depends on who is quicker.")
    parts.append(f"\n\n{HEAD}")
    for row in came:
        again = f"{row.again.role} {row.again.name}" if row.again else ""
        at = row.point.name + (f" (arrival {row.point.count})" if row.point.count > 1 else "")
        parts.append(f"| {row.point.role} | {at} | {row.how} | {again} | {row.outcome} |\n")
    return "".join(parts)
