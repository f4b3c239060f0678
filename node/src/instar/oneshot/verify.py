"""`instar.pyz verify --state DIR --target PATH [--server URL … | --from DIR]`: is this target signed for now?

A one-shot child of the updater, so that no resident ever loads TUF. One line of JSON on stdout:

    {"ok":true,"target":{"path","length","hashes":{"sha256"},"custom":{…}},
     "versions":{"root","timestamp","snapshot","targets"},"url_path":"targets/node/<sha256>.instar-1.1.0.tar.gz",
     "dropped":[]}
    {"ok":false,"error":{"code","text"},"kind":"trust|stale|expired|absent|unreachable|refused|machine|input"}

`kind` says what to do: `trust` is an alarm; `stale`, `expired`, `absent`, `unreachable`, `refused` mean to
wait and ask again. The exit status is that of the error's class (core/errors.py).

With `--from`, the metadata of a parcel are read as if a server had given them: all that holds for a server's
holds for them, against what this node has already. Where the node has newer ones, those decide.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instar.core.errors import (
    InputError,
    InstarError,
    MachineError,
    ServerRefused,
    ServerUnreachable,
    TrustError,
)
from instar.host.layout import Layout
from instar.host.transport import Endpoint, Transport
from instar.oneshot import diet
from instar.trust.paths import check_path
from instar.trust.program import program_digest
from instar.version import VERSION

if TYPE_CHECKING:
    from instar.oneshot.metadata import VerifiedTarget

KINDS: dict[str, str] = {"stale-mirror": "stale", "no-such-target": "absent"}
KIND_OF_CLASS: tuple[tuple[type[InstarError], str], ...] = (
    (TrustError, "trust"),
    (ServerUnreachable, "unreachable"),
    (ServerRefused, "refused"),
    (MachineError, "machine"),
    (InputError, "input"),
)


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    try:
        answer = _run(options)
    except InstarError as error:
        print(json.dumps({"ok": False, "error": error.as_json(), "kind": kind_of(error)}), flush=True)
        return error.exit_status
    print(json.dumps(answer), flush=True)
    return 0


def kind_of(error: InstarError) -> str:
    """What a caller does about `error`."""
    if error.code.startswith("expired-"):
        return "expired"
    by_class = (kind for cls, kind in KIND_OF_CLASS if isinstance(error, cls))
    return KINDS.get(error.code) or next(by_class, "machine")


def _run(options: argparse.Namespace) -> dict[str, Any]:
    diet.apply()
    layout = Layout(options.state)
    check_path(options.target, "target")
    now = datetime.now(UTC)
    found = _from_folder(options, layout, now) if options.folder else _from_servers(options, layout, now)
    return {
        "ok": True,
        "target": {
            "path": found.path,
            "length": found.length,
            "hashes": {"sha256": found.sha256},
            "custom": found.custom,
        },
        "versions": found.versions,
        "url_path": found.url_path,
        "dropped": found.dropped,
    }


def _from_folder(options: argparse.Namespace, layout: Layout, now: datetime) -> VerifiedTarget:
    from instar.oneshot.metadata import from_folder, verify_target

    if options.server:
        raise InputError("usage", "cannot verify: expected --server or --from, got both")
    if not options.folder.is_dir():
        raise InputError("no-metadata", f"cannot verify: there is no folder {options.folder}")
    try:
        return verify_target(layout.trust, options.target, from_folder(options.folder), now)
    except TrustError as error:
        if KINDS.get(error.code) != "stale":
            raise
    # It is older than what this node has verified, which is asked whether the target is signed still.
    kept = from_folder(options.folder, layout.trust)
    return verify_target(layout.trust, options.target, kept, now)


def _from_servers(options: argparse.Namespace, layout: Layout, now: datetime) -> VerifiedTarget:
    from instar.oneshot.metadata import verify_target

    failure: InstarError | None = None
    program = options.program or own_header("updater")
    for server in options.server or [server_of(layout)]:
        endpoint = endpoint_of(layout, server, options.proxy, program, options.timeout, options.pin)
        transport = Transport(endpoint)
        try:
            return verify_target(layout.trust, options.target, fetch_by(transport), now)
        except ServerUnreachable as error:
            failure = error
            continue
        finally:
            transport.close()
    raise failure or InputError("no-server", "cannot verify: no server was given")


def fetch_by(transport: Transport) -> Callable[[str], bytes]:
    """How the metadata comes."""
    return lambda path: transport.get(f"/v1/{path}")


def endpoint_of(
    layout: Layout, server: str, proxy: str, program: str, timeout_s: float, pin: str = ""
) -> Endpoint:
    return Endpoint(server, layout.ca, layout.certificate, layout.key, proxy, program, timeout_s, pin)


def own_header(role: str) -> str:
    """The Instar-Program header for the program file that the interpreter was given. Raises MachineError."""
    try:
        data = Path(sys.argv[0]).read_bytes()
    except OSError as error:
        raise MachineError("no-program", f"cannot read {sys.argv[0]}: {error.strerror}") from error
    return f"{role} {VERSION} {program_digest(data)}"


def server_of(layout: Layout) -> str:
    """The node's own server. Raises InputError `no-server`."""
    try:
        return str(json.loads(layout.node.read_bytes())["server"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("no-server", f"cannot verify: {layout.node} names no server: {error!r}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="instar verify", description="Check that a target is signed for now, and print what was signed."
    )
    parser.add_argument("--state", type=Path, required=True, help="the node's state folder")
    parser.add_argument("--target", required=True, help="target path, such as node/instar-1.1.0.tar.gz")
    parser.add_argument(
        "--server",
        action="append",
        help="https://host:port; several are tried in turn (default: the node's own)",
    )
    parser.add_argument(
        "--from", dest="folder", type=Path, metavar="DIR", help="a parcel's metadata, instead of a server's"
    )
    parser.add_argument(
        "--trust-only", action="store_true", help="ask no server, whatever else is said; with --from"
    )
    parser.add_argument("--proxy", default="", help="http://host:port")
    parser.add_argument(
        "--program", default="", help="value of the Instar-Program header (default: of this file)"
    )
    parser.add_argument(
        "--pin", default="", help="SHA-256 of the one server certificate to accept (default: the CA's word)"
    )
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds for each answer (default 20)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
