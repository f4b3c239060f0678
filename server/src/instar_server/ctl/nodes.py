"""`instarctl nodes` and `instarctl groups`."""

from __future__ import annotations

import socket
from typing import Annotated, Any

import typer
from rich.table import Table

from instar.core.errors import InputError, MachineError, TrustError
from instar_server.ctl import ids
from instar_server.ctl.output import AsJson, connected, make_table, refuse, short, show, when

app = typer.Typer(no_args_is_help=True)
groups = typer.Typer(no_args_is_help=True)

PAGE = 500
KNOCK_S = 5.0
NodeArgument = Annotated[str, typer.Argument(help="The node's id.")]


@app.command("list")
def list_nodes(
    context: typer.Context,
    group: Annotated[str | None, typer.Option(help="Only this group.")] = None,
    as_json: AsJson = False,
) -> None:
    """All nodes."""
    with connected(context) as client:
        found: list[dict[str, Any]] = []
        after = None
        while True:
            page = client.get("/nodes", group=group, after=after, limit=PAGE)
            found += page["nodes"]
            after = page["next"]
            if after is None:
                break
    columns = ("node", "group", "state", "agent", "updater", "health", "last seen", "update")
    show(found, as_json, lambda: make_table(columns, [_row(node) for node in found]))


def _row(node: dict[str, Any]) -> tuple[Any, ...]:
    health = {True: "ok", False: "bad", None: ""}[node["health"].get("ok")]
    tx = node["transaction"]
    update = f"{tx['line']} {tx['version']} {tx['phase']}" if tx else ""
    return (
        node["id"], node["group"], node["state"], _program(node["agent"]), _program(node["updater"]),
        health, when(node["last_seen"]), update,
    )  # fmt: skip


def _program(program: dict[str, str]) -> str:
    return f"{program['version']} {short(program['digest'])}".strip()


@app.command("show")
def show_node(context: typer.Context, node: NodeArgument, as_json: AsJson = False) -> None:
    """One node."""
    with connected(context) as client:
        found = client.get(f"/nodes/{ids.node_id(node)}")
    show(found, as_json, lambda: _detail(found))


def _detail(node: dict[str, Any]) -> Table:
    tx = node["transaction"]
    rows = [
        ("group", node["group"]),
        ("state", node["state"] + (f": {node['revoked_why']}" if node["revoked_why"] else "")),
        ("enrolled", when(node["enrolled"])),
        ("last seen", when(node["last_seen"])),
        ("agent", _program(node["agent"])),
        ("built", node["built"]),
        ("updater", _program(node["updater"])),
        *((f"wanted {line}", f"{w['version']} (by {w['scope']})") for line, w in node["wanted"].items()),
        *((f"module {name}", f"{m['state']} {short(m['digest'])}") for name, m in node["modules"].items()),
        ("address", f"{node['address']} port {node['wake_port'] or 'none'}" if node["address"] else ""),
        ("last update", f"{tx['line']} {tx['version']}: {tx['phase']} {tx['reason_text']}" if tx else "none"),
        ("machine", " ".join(part for part in (node["os"], node["arch"], node["python"]) if part)),
        *((f"certificate {c['serial'][:8]}", f"ends {when(c['not_after'])}") for c in node["certificates"]),
    ]
    return make_table(("node", node["id"]), rows)


@app.command()
def history(
    context: typer.Context,
    node: NodeArgument,
    limit: Annotated[int, typer.Option(help="So many entries.")] = 50,
    as_json: AsJson = False,
) -> None:
    """What happened on a node, newest first. Ends with status 3 when the history was altered."""
    with connected(context) as client:
        found = client.get(f"/nodes/{ids.node_id(node)}/history", limit=limit)
    columns = ("n", "when", "line", "version", "phase", "reason")
    rows = [
        (e["n"], when(e["wall"]), _line(e), _versions(e), e["phase"], e["reason_text"] or e["reason_code"])
        for e in found["entries"]
    ]
    fault = TrustError("history-altered", f"this history was altered: {found['fault']}")
    if found["whole"] or not as_json:
        show(found, as_json, lambda: make_table(columns, rows))
    if found["removed"] and not as_json:
        typer.echo(f"entries 1 to {found['removed']} were removed for their age", err=True)
    if not found["whole"]:
        refuse(fault, as_json, found)


def _line(entry: dict[str, Any]) -> str:
    """With the slot of a system image, and how it is activated."""
    more = [f"slot {entry['slot']}" if entry["slot"] else "", f"by {entry['mode']}" if entry["mode"] else ""]
    said = ", ".join(part for part in more if part)
    return f"{entry['line']} ({said})" if said else str(entry["line"])


def _versions(entry: dict[str, Any]) -> str:
    """Of a system both, since both stay on the node."""
    both = entry["line"] == "os" and entry["from_version"]
    return f"{entry['from_version']} -> {entry['version']}" if both else str(entry["version"])


@app.command()
def poke(
    context: typer.Context,
    node: NodeArgument,
    via_server: Annotated[
        bool,
        typer.Option(
            "--via-server", help="Let the server connect, for a node that is not reached from here."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Wake a node: one TCP connection to its wake-up port makes it phone home now."""
    with connected(context) as client:
        if via_server:
            found = client.post(f"/nodes/{ids.node_id(node)}/poke", {})
        else:
            seen = client.get(f"/nodes/{ids.node_id(node)}")
            found = {"address": seen["address"], "port": seen["wake_port"]}
            _knock(node, found["address"], found["port"])
    show(found, as_json, lambda: f"knocked at {found['address']} port {found['port']}")


def _knock(node: str, address: str, port: int) -> None:
    """Raises InputError `no-wake-port`, MachineError `no-answer`."""
    if not address or not port:
        raise InputError("no-wake-port", f"cannot poke {node}: it has told of no wake-up port")
    try:
        socket.create_connection((address, port), KNOCK_S).close()
    except OSError as error:
        text = f"cannot poke {node}: nothing answers at {address} port {port} from here: {error}; try --via-server"
        raise MachineError("no-answer", text) from None


@app.command()
def revoke(
    context: typer.Context,
    node: NodeArgument,
    why: Annotated[str, typer.Option(help="For the history.")] = "",
    as_json: AsJson = False,
) -> None:
    """Never serve this node again."""
    with connected(context) as client:
        found = client.post(f"/nodes/{ids.node_id(node)}/revoke", {"why": why})
    show(found, as_json, lambda: f"revoked {node}")


@app.command()
def move(
    context: typer.Context,
    node: NodeArgument,
    group: Annotated[str, typer.Option(help="The new group.")],
    as_json: AsJson = False,
) -> None:
    """Put a node into another group."""
    with connected(context) as client:
        found = client.put(f"/nodes/{ids.node_id(node)}/group", {"group": group})
    show(found, as_json, lambda: f"moved {node} to {group}")


@groups.command("list")
def list_groups(context: typer.Context, as_json: AsJson = False) -> None:
    """All groups."""
    with connected(context) as client:
        found = client.get("/groups")["groups"]
    show(found, as_json, lambda: make_table(("group", "nodes"), [(g["name"], g["nodes"]) for g in found]))


@groups.command("add")
def add_group(context: typer.Context, name: str, as_json: AsJson = False) -> None:
    """Make a group."""
    with connected(context) as client:
        found = client.post("/groups", {"name": name})
    show(found, as_json, lambda: f"group {name} is there")
