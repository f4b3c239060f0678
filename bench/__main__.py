"""`python -m bench`: all figures, or some."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

from rich.console import Console

from bench import cycles, jobs, nodes, os_slots, report, server
from bench.figures import Figure
from bench.peers import apart, beside, beside_salt
from instar.core.errors import InstarError

OUT = Path("docs/performance.md")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make bench",
        description="Measure Instar on this machine, print a table and write it to a file. Takes some minutes; "
        "run nothing else meanwhile.",
    )
    parser.add_argument(
        "--only",
        choices=("nodes", "cycles", "server", "jobs", "os"),
        help="only these figures; written only into a FILE that is named, beside the others that stand there",
    )
    parser.add_argument(
        "--updates", type=int, default=10, metavar="N", help="updates to time (default %(default)s)"
    )
    parser.add_argument(
        "--cycles",
        type=int,
        default=20,
        metavar="N",
        help="updates of the update test tool to time, in each mode (default %(default)s)",
    )
    parser.add_argument(
        "--agents", type=int, default=2000, metavar="N", help="simulated agents (default %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=500, metavar="N", help="jobs of each kind to time (default %(default)s)"
    )
    parser.add_argument(
        "--slots",
        type=int,
        default=7,
        metavar="N",
        help="turns of a system image into a slot (default %(default)s)",
    )
    parser.add_argument(
        "--boots",
        type=int,
        default=3,
        metavar="N",
        help="updates of a virtual machine to time, by kexec and by a reboot; 0 for none (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"default {OUT}")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="measure MeshCentral and Salt as well; fetches them with npm and pip (RAUC is always measured: Debian's "
        "packages, unpacked where they are not installed)",
    )
    parser.add_argument(
        "--peers-cache",
        type=Path,
        default=apart.default_cache(),
        metavar="DIR",
        help="where they are installed, and what takes long to make is kept (default %(default)s)",
    )
    options = parser.parse_args()
    figures: list[Figure] = []
    try:
        if options.only in (None, "nodes"):
            figures += nodes.measure(options.updates)
        if options.only in (None, "cycles"):
            figures += cycles.measure(options.cycles)
        if options.only in (None, "server"):
            figures += server.measure(options.agents)
        if options.only in (None, "jobs"):
            figures += jobs.measure(options.jobs)
        if options.only in (None, "os"):
            figures += os_slots.measure(options.slots, options.boots, options.peers_cache)
        if options.peers and options.only not in ("jobs", "cycles", "os"):
            figures = beside.measure(options.updates, options.peers_cache).added_to(figures)
        if options.peers and options.only in (None, "jobs"):
            figures = beside_salt.measure(options.jobs, options.peers_cache) + figures
    except InstarError as error:
        print(f"make bench: {error}", file=sys.stderr)
        return error.exit_status
    report.show(figures, Console())
    if options.only is None or options.out is not None:
        _write(options.out or OUT, figures, options.only)
    return 0 if all(figure.met is not False for figure in figures) else 1


def _write(out: Path, figures: list[Figure], only: str | None) -> None:
    today = datetime.datetime.now(datetime.UTC).date()
    if only is None:
        text = report.markdown(figures, today)
    else:
        text = report.merged(out.read_text(encoding="utf-8"), figures, today, only)
    out.write_text(text, encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(main())
