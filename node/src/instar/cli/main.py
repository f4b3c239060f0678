"""`instar COMMAND`: arguments in, an exit status out. Each command lives in the file named after it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from instar.cli import control, install, push, restart, show
from instar.core.errors import InputError, InstarError, MachineError
from instar.core.modules import module_of
from instar.core.system import LINE as SYSTEM
from instar.host.layout import LINES
from instar.oneshot import identity

DEFAULT_STATE = Path("/var/lib/instar")

ABOUT = """\
Keeps this machine's agent, and everything it looks after, on the release that its server wants:
staged, verified, rehearsed, activated for a trial, confirmed or put back."""

EPILOG = """\
examples:
  instar install                      make this machine a node (the program carries its server's address)
  instar install --state DIR --service none   the same below DIR, kept running without systemd
  instar status                       what runs, and whether it is well
  instar history                      why this node is on this version
  instar rollback                     go back to the previous release
  instar push FILE                    install a release from its parcel
  instar restart                      restart the agent and its modules, losing nothing
  instar restart --module NAME        restart one module, and what depends on it

exit status: 0 done, 2 wrong usage, 3 not trusted, 4 this machine, 5 server unreachable, 6 server refused,
             7 the release is at fault"""
INSPECT = "inspect"  # an entry of its own (instar.__main__): the installer's child must be small


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other refusal."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"instar: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: list[str]) -> int:
    if argv[:1] == [INSPECT]:
        return identity.main(argv[1:])
    args = _parser().parse_args(argv)
    try:
        answer = args.run(args)
    except InstarError as error:
        return _fail(args, error)
    except PermissionError as error:
        return _fail(args, MachineError("not-permitted", f"cannot use {error.filename}: run it as root"))
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _fail(args, MachineError("machine", f"cannot use{where}: {error.strerror or error}"))
    except KeyboardInterrupt:
        return 130
    if args.json:
        print(json.dumps(answer, indent=1))
    else:
        for line in args.lines(answer):
            print(line)
    return 0


def _fail(args: argparse.Namespace, error: InstarError) -> int:
    if args.json:
        print(json.dumps({"error": error.as_json()}))
    else:
        print(f"instar: {error.text} ({error.code})", file=sys.stderr)
    return error.exit_status


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("instar", description=ABOUT, epilog=EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, text: str, run: Any, lines: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--state", type=_folder, default=DEFAULT_STATE, help="state folder (%(default)s)")
        sub.add_argument("--json", action="store_true", help="answer for programs")
        sub.set_defaults(run=run, lines=lines)
        return sub

    sub = command("install", "Make this machine a node of the server that the program names.", install.install,
                  install.lines)  # fmt: skip
    sub.add_argument(
        "--service", choices=install.SERVICES, default="auto", help="who keeps it running (%(default)s)"
    )
    sub.add_argument("--no-start", dest="start", action="store_false", help="install, but do not start")
    sub.add_argument("--start", action="store_true", default=True, help=argparse.SUPPRESS)
    sub.add_argument("--embed", type=Path, help="take the embedded configuration from this file instead")
    sub.add_argument(
        "--api",
        metavar="ADDRESS:PORT",
        help="where the updater's API listens; '' is nowhere (127.0.0.1:7612)",
    )
    sub.add_argument("--pin", default="", metavar="SHA256", help="refuse any other root of trust")
    sub.add_argument("--wait", type=float, default=30.0, metavar="S", help="for the server (%(default)s)")
    command("uninstall", "Stop this node's programs and remove them and all state.", install.uninstall,
            install.gone_lines)  # fmt: skip
    command("start", "Start the agent and the updater.", control.start, control.lines)
    command("stop", "Stop the agent and the updater.", control.stop, control.lines)
    command("status", "Show what runs, and whether it is well.", show.status, show.status_lines)
    sub = command("history", "Show why this node is on this version.", show.history, show.history_lines)
    sub.add_argument(
        "--limit", type=_count, default=20, metavar="N", help="newest N transactions (%(default)s)"
    )
    sub = command("rollback", "Go back to the previous release.", control.rollback, control.rollback_lines)
    sub.add_argument(
        "--line", type=_line, default="agent", help="agent, updater, os or module/NAME (%(default)s)"
    )
    sub.add_argument("--wait", type=float, default=300.0, metavar="S", help="for its end (%(default)s)")
    sub = command(
        "push", "Install a release from a file; the server tests it as any other.", push.push, push.push_lines
    )
    sub.add_argument("parcel", type=Path, help="what `instarctl release parcel` wrote")
    sub.add_argument("--line", choices=LINES, default="agent", help="agent or updater (%(default)s)")
    sub.add_argument("--wait", type=float, default=600.0, metavar="S", help="for its end (%(default)s)")
    sub = command("quarantine", "Show or clear the releases that failed here.", control.quarantine,
                  control.quarantine_lines)  # fmt: skip
    sub.add_argument("--clear", metavar="VERSION|all", help="let it be tried again")
    _module_commands(command)
    commands.add_parser(INSPECT, help="Check a program file and the configuration that it carries.")
    command("version", "Show which build this is.", show.version, show.version_lines)
    return parser


def _module_commands(command: Any) -> None:
    sub = command("restart", "Restart the agent and all modules, or some modules.", restart.restart,
                  restart.restart_lines)  # fmt: skip
    sub.add_argument(
        "--module", action="append", default=[], metavar="NAME", help="only this one (again for more)"
    )
    sub.add_argument("--within", type=float, default=30.0, metavar="S",
                     help="past this bound the rest is killed and started again (%(default)s)")  # fmt: skip
    sub.add_argument("--wait", type=float, default=45.0, metavar="S", help="for its end (%(default)s)")
    command("modules", "Show the service modules that run here.", restart.modules, restart.modules_lines)


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a folder")
    return Path(text).absolute()


def _line(text: str) -> str:
    try:
        if text in (*LINES, SYSTEM) or module_of(text):
            return text
    except InputError as error:
        raise argparse.ArgumentTypeError(error.text) from None
    raise argparse.ArgumentTypeError(f"expected agent, updater, os or module/NAME, got {text!r}")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
