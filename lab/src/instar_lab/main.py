"""`instar-lab`: what the lab can do, from the command line."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from instar.core.errors import InputError, InstarError, MachineError
from instar_lab.updatetest import options as update_options

DESCRIPTION = """\
The lab of Instar: real servers and nodes on this machine, in folders that are gone afterwards.
Nothing here ever runs on a node; everything uses loopback only."""

DEMO = """\
Starts a real server and real nodes on this machine, updates them, then publishes five bad releases
in turn: one that does not start, one that hangs, one whose rehearsal gives a wrong reply, one that crashes a
second after activation, and one whose bytes were altered after signing. After each, every node must
run the good release; what it runs is read from /proc. Then modules come to the nodes, jobs are run, and a
module and all agents are restarted with jobs under way. Ends with status 1 if any node is anywhere else,
any job was lost, or a module forgot its state.

  instar-lab demo                                     three nodes
  instar-lab demo --nodes 5 --report demo.json        five, and a report for machines
  instar-lab demo --keep /tmp/d                       leave all logs and journals in /tmp/d to look at"""

SIM = """\
Enrols simulated agents at a running server and keeps them connected: each has its own certificate and
its own TLS connection, says hello, answers pings and jobs, and comes back when it is cut off.

  instar-lab sim --server https://127.0.0.1:8443 --ca DATA/ca/ca.pem --token TOKEN --agents 500"""

BUILD = """\
Builds the node program instar.pyz: the same source gives the same bytes. With --variant it is broken
on purpose, for tests. With --recovery it is the recovery core: the part of the same source that brings back
a node whose own update code is broken."""

MODULES = """\
Compiles and packs modules from their folders, ready for 'instarctl release add'. A module whose compiler is
not installed is passed over, with a line on stderr that says what to install; the status is then 4, or 0
with --skip-missing. A native module is packed for this machine alone.

  instar-lab modules modules/* --out dist/modules"""

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, interrupt)  # so that everything is cleaned up, as after Ctrl-C
    play: Callable[[argparse.Namespace], int] = options.play
    try:
        return play(options)
    except KeyboardInterrupt:
        print("instar-lab: interrupted; everything that was started has been ended", file=sys.stderr)
        return INTERRUPTED
    except InstarError as error:
        print(f"instar-lab: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"instar-lab: {refused(error)}", file=sys.stderr)
        return MachineError.exit_status


def refused(error: OSError) -> str:
    """What this machine has refused, in one line."""
    what = f"use {error.filename}" if error.filename else "go on"
    return f"cannot {what}: {error.strerror or error}; give another place, or see 'instar-lab --help'"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="instar-lab", description=DESCRIPTION, formatter_class=style)
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="real nodes survive five bad releases, and restarts",
        description=DEMO,
        formatter_class=style,
    )
    demo.add_argument(
        "--nodes", type=count, default=3, metavar="N", help="how many nodes (default %(default)s)"
    )
    demo.add_argument("--report", type=Path, metavar="FILE", help="write what came of each step as JSON")
    demo.add_argument("--keep", type=Path, metavar="DIR", help="use this new folder, and leave it in place")
    demo.set_defaults(play=play_demo)

    sim = commands.add_parser("sim", help="thousands of agents", description=SIM, formatter_class=style)
    sim.add_argument("--server", required=True, metavar="URL", help="the gateway, https://host:port")
    sim.add_argument("--ca", required=True, type=Path, metavar="FILE", help="the fleet's CA certificate")
    sim.add_argument("--token", required=True, help="an enrolment token with enough uses")
    sim.add_argument("--agents", type=count, default=100, metavar="N", help="how many (default %(default)s)")
    sim.add_argument(
        "--seconds", type=float, default=0.0, metavar="S", help="how long; 0 (default): until Ctrl-C"
    )
    sim.set_defaults(play=play_sim)

    made = commands.add_parser("build", help="the node program", description=BUILD, formatter_class=style)
    made.add_argument("--version", required=True, metavar="1.2.3", help="the version that the program says")
    made.add_argument("--out", required=True, type=Path, metavar="FILE", help="where to write the program")
    made.add_argument(
        "--variant", default="", metavar="NAME", help="how it is broken; 'list' tells the names"
    )
    made.add_argument(
        "--built",
        metavar="DATE",
        help="when, for it to tell: 2026-11-21T16:00:00Z (default: SOURCE_DATE_EPOCH, else nothing)",
    )
    made.add_argument(
        "--recovery", action="store_true", help="build the recovery core, instar-recovery.pyz, instead"
    )
    made.set_defaults(play=play_build)

    packed = commands.add_parser(
        "modules", help="archives of modules", description=MODULES, formatter_class=style
    )
    packed.add_argument("source", nargs="+", type=Path, metavar="FOLDER", help="folders with a module.toml")
    packed.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the archives go")
    packed.add_argument(
        "--skip-missing", action="store_true", help="a compiler that is not installed is no error"
    )
    packed.set_defaults(play=play_modules)

    tested = commands.add_parser(
        "update-test",
        help="updates this machine's agent over and over",
        description=update_options.HELP,
        formatter_class=style,
    )
    update_options.add_to(tested)
    tested.set_defaults(play=play_update_test)
    return top


def count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 100000, got {text!r}")
    return int(text)


def play_demo(options: argparse.Namespace) -> int:
    from rich.console import Console

    from instar_lab.demo.run import run
    from instar_lab.demo.view import View
    from instar_lab.fleet import Fleet

    if options.keep is not None:
        check_new(options.keep)
    console, began = Console(), time.monotonic()
    with View(console) as view:
        view.headline("making keys and starting the server")
        with Fleet(options.nodes, options.keep) as fleet:
            report = run(fleet, view, options.report, began)
        verdict = (
            "every node runs the good release, and no job was lost" if report.ok else "something went wrong"
        )
        view.say(f"{verdict}; {report.seconds:.0f} s", "bold green" if report.ok else "bold red")
    return 0 if report.ok else 1


def check_new(folder: Path) -> None:
    """Raises InputError `not-empty` when something is there that the demo's files would mix with."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink() or folder.parent.is_file():
        raise InputError("not-empty", f"cannot keep the demo: expected a new or empty folder, got {folder}")


def play_sim(options: argparse.Namespace) -> int:
    import uvloop

    from instar_lab.sim.play import play

    return uvloop.run(play(options.server, options.ca, options.token, options.agents, options.seconds))


def play_build(options: argparse.Namespace) -> int:
    from instar_lab.program import build, recovery, variants

    if options.variant == "list":
        for name, what in variants.VARIANTS.items():
            print(f"{name:24} {what}")
        return 0
    if options.recovery and options.variant:
        raise InputError("usage", "cannot build: expected --recovery or --variant, got both")
    if options.recovery:
        program = recovery.build_core(options.version, built=options.built)
    elif options.variant:
        program = variants.variant(options.variant, options.version)
    else:
        program = build.build(options.version, built=options.built)
    try:
        build.write(program, options.out)
    except OSError as error:
        text = f"cannot write {options.out}: {error.strerror}; give --out a place that can be written"
        raise MachineError("disk-failed", text) from error
    print(f"{options.out}: version {program.version}, {len(program.data):,} bytes, digest {program.digest}")
    return 0


def play_modules(options: argparse.Namespace) -> int:
    from instar_lab import modules

    passed_over = modules.pack_all(options.source, options.out, print)
    for name, error in passed_over.items():
        print(f"instar-lab: passed over {name}: {error.text}", file=sys.stderr)
    if passed_over and not options.skip_missing:
        return MachineError.exit_status
    return 0


def play_update_test(options: argparse.Namespace) -> int:
    from instar_lab.updatetest.run import play

    return play(options)


if __name__ == "__main__":
    sys.exit(main())
