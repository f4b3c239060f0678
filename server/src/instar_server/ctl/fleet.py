"""`instarctl want`, `unwant`, `wishes`, `status`, `releases`, `program` and `trust`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from instar.core.errors import InputError
from instar_server.ctl import ids
from instar_server.ctl.output import AsJson, connected, make_table, plain_errors, short, show, when
from instar_server.trust.files import write_atomic

releases = typer.Typer(no_args_is_help=True)
program = typer.Typer(no_args_is_help=True)
trust = typer.Typer(no_args_is_help=True)

Group = Annotated[str | None, typer.Option(help="For every node of this group.")]
Node = Annotated[str | None, typer.Option(help="For this node alone; goes before its group's wish.")]
Module = Annotated[
    list[str] | None,
    typer.Option(help="A service module in place of the node program; several times for several."),
]
Lines = Annotated[list[str] | None, typer.Option("--line", help="agent or updater; both if not given.")]


class Via(StrEnum):
    PULL, NATIVE, RECOVERY = "pull", "native", "recovery"


def _subject(group: str | None, node: str | None) -> tuple[str, str]:
    if (group is None) == (node is None):
        raise InputError("bad-options", "cannot tell for whom: expected either --group or --node")
    return ("group", group) if group is not None else ("node", ids.node_id(str(node)))


def _lines(lines: list[str] | None, modules: list[str] | None) -> list[str]:
    if lines and modules:
        raise InputError("bad-options", "cannot tell what: expected either --line or --module")
    return [f"module/{name}" for name in modules or ()] or lines or ["updater", "agent"]


def want(
    context: typer.Context,
    version: Annotated[str, typer.Option(help="A published release, or with --module the module's version.")],
    group: Group = None,
    node: Node = None,
    line: Lines = None,
    module: Module = None,
    via: Annotated[
        Via, typer.Option(help="pull: nodes fetch it; native: through their channels; recovery: by a core.")
    ] = Via.PULL,
    as_json: AsJson = False,
) -> None:
    """Want a release. The same wish again makes nodes that gave up on it try again."""
    with plain_errors(as_json):
        scope, subject = _subject(group, node)
        lines = _lines(line, module)
    with connected(context) as client:
        body = {"scope": scope, "subject": subject, "lines": lines, "version": version, "via": via.value}
        made = client.put("/wishes", body)["wishes"]
    show(
        made,
        as_json,
        lambda: f"{version} is wanted for {scope} {subject}: {', '.join(w['line'] for w in made)}",
    )


def unwant(
    context: typer.Context,
    group: Group = None,
    node: Node = None,
    line: Lines = None,
    module: Module = None,
    as_json: AsJson = False,
) -> None:
    """Take wishes back. Nodes stay on the program that they run; a module that is wanted no more is stopped."""
    with plain_errors(as_json):
        scope, subject = _subject(group, node)
        lines = _lines(line, module)
    with connected(context) as client:
        done = client.delete("/wishes", scope=scope, subject=subject, line=lines)
    show(done, as_json, lambda: f"nothing is wanted any more for {scope} {subject}")


def wishes(context: typer.Context, as_json: AsJson = False) -> None:
    """All wishes."""
    with connected(context) as client:
        found: list[dict[str, Any]] = client.get("/wishes")["wishes"]
    columns = ("for", "name", "line", "version", "digest", "via", "generation", "made")
    rows = [
        (
            w["scope"],
            w["subject"],
            w["line"],
            w["version"],
            short(w["digest"]),
            w["via"],
            w["generation"],
            when(w["made"]),
        )
        for w in found
    ]
    show(found, as_json, lambda: make_table(columns, rows))


def status(context: typer.Context, as_json: AsJson = False) -> None:
    """Whether the server is well."""
    with connected(context) as client:
        found = client.get("/ready")
    show(found, as_json, lambda: f"server {found['version']} is ready; {found['connected']} nodes connected")


@releases.command("list")
def list_releases(context: typer.Context, as_json: AsJson = False) -> None:
    """The published releases, recovery cores and system bundles."""
    with connected(context) as client:
        answer = client.get("/releases")
    found: list[dict[str, Any]] = answer["releases"] + answer["cores"] + answer["bundles"]
    rows = [(r["version"], short(r["digest"]), r["length"], r["target"]) for r in found]
    show(found, as_json, lambda: make_table(("version", "digest", "bytes", "target"), rows))


def list_modules(context: typer.Context, as_json: AsJson = False) -> None:
    """The published modules, newest version first."""
    with connected(context) as client:
        found: list[dict[str, Any]] = client.get("/modules")["modules"]
    rows = [(m["name"], m["version"], m["runs"], m["mode"], short(m["digest"]), m["length"]) for m in found]
    show(found, as_json, lambda: make_table(("module", "version", "runs", "mode", "digest", "bytes"), rows))


@program.command("download")
def download(
    context: typer.Context,
    token: Annotated[str, typer.Option(help="An enrolment token.")],
    out: Annotated[Path, typer.Option(help="Where to write it.")] = Path("instar.pyz"),
    version: Annotated[str | None, typer.Option(help="Else what is wanted for the token's group.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the program with this server's configuration in it: the one file that installs a node."""
    with connected(context) as client:
        data = client.get_bytes("/program", token=token, version=version)
        write_atomic(out, data, 0o700)  # there is a token in it
    show({"path": str(out), "bytes": len(data)}, as_json, lambda: f"wrote {out}, {len(data)} bytes")


@trust.command("status")
def trust_status(context: typer.Context, as_json: AsJson = False) -> None:
    """Version and expiry of every role. Ends with status 3 when one has expired."""
    with connected(context) as client:
        found: list[dict[str, Any]] = client.get("/trust")["roles"]
    rows = [(r["role"], r["version"], when(r["expires"]), f"{r['threshold']} of {r['keys']}") for r in found]
    show(found, as_json, lambda: make_table(("role", "version", "expires", "keys"), rows))
    if any(role["expired"] for role in found):
        raise typer.Exit(3)
