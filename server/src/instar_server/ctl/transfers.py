"""`instarctl node recover` and `node transfer`: what is sent to a node through its channel."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.table import Table

from instar_server.ctl import ids
from instar_server.ctl.client import Client
from instar_server.ctl.nodes import NodeArgument
from instar_server.ctl.output import AsJson, connected, console, make_table, plain_errors, short, show, when
from instar_server.ctl.tokens import seconds

GOOD = frozenset({"received", "not-needed", "done"})
NOT_WELL = 1

Within = Annotated[str, typer.Option(help="Wait no longer than this.")]


def transfer(
    context: typer.Context,
    node: NodeArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Until it has ended.")] = False,
    within: Within = "1h",
    as_json: AsJson = False,
) -> None:
    """What is being sent to a node, or was last. With --watch it ends with 1 unless all went well."""
    with plain_errors(as_json):
        within_s = seconds(within)
    with connected(context) as client:
        found = client.get(f"/nodes/{ids.node_id(node)}/transfer")
        if watch and found["ended"] is None and found["state"] != "none":
            found = _follow(client, node, "", within_s, as_json)
    show(found, as_json, lambda: _table(found))
    if watch and found["state"] not in GOOD:
        raise typer.Exit(NOT_WELL)


def recover(
    context: typer.Context,
    node: NodeArgument,
    version: Annotated[
        str | None, typer.Option(help="Else what is wanted, else what it last ran, else the newest.")
    ] = None,
    line: Annotated[list[str] | None, typer.Option(help="agent or updater; both if not given.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended.")] = False,
    within: Within = "10m",
    as_json: AsJson = False,
) -> None:
    """Have a release installed by a recovery core, for a node whose own update code is broken. Ends with 1 when
    it was waited for and did not go well."""
    with plain_errors(as_json):
        within_s = seconds(within)
    body: dict[str, Any] = {"version": version} | ({"lines": line} if line else {})
    with connected(context) as client:
        found = client.post(f"/nodes/{ids.node_id(node)}/recover", body)
        if wait:
            found = _follow(client, node, found["began"], within_s, as_json)
    show(found, as_json, lambda: _table(found))
    if wait and found["state"] not in GOOD:
        raise typer.Exit(NOT_WELL)


def _follow(client: Client, node: str, began: Any, within_s: float, quiet: bool) -> dict[str, Any]:
    """The transfer once it has ended, or as it is after `within_s` seconds. Each change is a line on stderr."""
    shown, until = console(stderr=True), time.monotonic() + within_s
    said, last = "", dict(client.get(f"/nodes/{ids.node_id(node)}/transfer"))
    for event in client.follow(f"/nodes/{ids.node_id(node)}/transfer/events", until):
        if event is None:
            continue
        last, line = event, _line(event)
        if line != said and not quiet:
            shown.print(line, markup=False, highlight=False)
            said = line
        if event["ended"] is not None and (not began or event["began"] >= began):
            break
    return last


def _line(view: dict[str, Any]) -> str:
    doing = " ".join(part for part in (view["state"], view["phase"]) if part)
    percent = f" {view['percent']:.0f} %" if view["percent"] >= 0 else ""
    core = f" by core {view['core']}" if view["core"] else ""
    why = f": {view['code']} {view['text']}".rstrip() if view["code"] or view["text"] else ""
    return f"{view['line']} {view['version']}{core}: {doing}{percent}{why}"


def _table(view: dict[str, Any]) -> Table:
    if view["state"] == "none":
        return make_table(("node", view["node"]), [("state", "nothing was sent")])
    percent = f" {view['percent']:g} %" if view["percent"] >= 0 else ""
    blocks = f"{view['blocks']} of {view['of_blocks']}, {view['window']} of {view['block']:,} bytes at a time"
    sent = f"{view['bytes']:,} of {view['length']:,}, {view['rate']:,.0f} a second"
    rows = [
        ("what", f"{view['line']} {view['version']} {short(view['digest'])}"),
        ("way", f"{view['via']}, for the sake of {view['cause']}"),
        ("core", view["core"]),
        ("state", view["state"] + (f": {view['code']} {view['text']}" if view["code"] else "")),
        ("phase", view["phase"] and view["phase"] + percent),
        ("blocks", blocks if view["of_blocks"] else ""),
        ("bytes", sent if view["length"] else ""),
        ("began", when(view["began"])),
        ("ended", when(view["ended"]) if view["ended"] is not None else ""),
    ]  # fmt: skip
    return make_table(("node", view["node"]), [row for row in rows if row[1]])
