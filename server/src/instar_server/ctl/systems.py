"""`instarctl node update-os`, `system`, `cold-boot`, `cancel-os`: the operating system of a node."""

from __future__ import annotations

import contextlib
import re
import time
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from instar.core.errors import InputError, ServerUnreachable
from instar_server.ctl import ids
from instar_server.ctl.client import Client
from instar_server.ctl.nodes import NodeArgument
from instar_server.ctl.output import AsJson, connected, plain, plain_errors, show
from instar_server.ctl.system_words import explanation, line_of, on, said_of, tables
from instar_server.ctl.tokens import seconds

SETTLE_S = 5.0  # for the node's report of its slots, which may come after the end of its transaction
NOT_WELL = 1
UNSEEN = "confirmed, cold boot not seen"
GOOD = frozenset({"confirmed", UNSEEN, "installed, not active"})

Within = Annotated[str, typer.Option(help="Wait no longer than this.")]


def update_os(
    context: typer.Context,
    node: NodeArgument,
    bundle: Annotated[
        str,
        typer.Option(
            help="NAME-VERSION, which is published, or an https URL that ends /NAME-VERSION.bundle."
        ),
    ] = "",
    activation: Annotated[str, typer.Option(help="none, reboot or kexec; must be given.")] = "",
    override_cold_boot: Annotated[
        bool,
        typer.Option("--override-cold-boot", help="Also if no cold boot of the system that runs was seen."),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended; 1 unless it went well.")] = False,
    within: Within = "2h",
    as_json: AsJson = False,
) -> None:
    """Install a system in a node's other slot, and activate it. The node goes back by itself if it does not come up."""
    with plain_errors(as_json):
        within_s = seconds(within)
    body = {
        "bundle": bundle or None, "activation": activation or None, "override_cold_boot": override_cold_boot,
    }  # fmt: skip
    with connected(context) as client:
        made = client.post(f"/nodes/{ids.node_id(node)}/update-os", body)
        if wait:
            made = _follow_one(client, made, within_s, as_json)
    show(made, as_json, lambda: said_of(made))
    if wait and made["outcome"] not in GOOD:
        _explain(made, within)


def cancel_os(context: typer.Context, node: NodeArgument, as_json: AsJson = False) -> None:
    """Take the open system update of a node back, as long as the node has not switched."""
    with connected(context) as client:
        gone = client.delete(f"/nodes/{ids.node_id(node)}/update-os")
    begun = "; the node had begun, and may still finish" if gone["phase"] else ""
    show(gone, as_json, lambda: f"cancelled {gone['id']}, {gone['name']} {gone['version']}{begun}")


def system(
    context: typer.Context,
    node: NodeArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Until the update that is open has ended.")] = False,
    within: Within = "2h",
    as_json: AsJson = False,
) -> None:
    """Both slots of a node, how it would boot, and its system updates. With --watch it ends with 1 unless the update
    that was open went well."""
    with plain_errors(as_json):
        within_s = seconds(within)
    update: dict[str, Any] | None = None
    with connected(context) as client:
        found = client.get(f"/nodes/{ids.node_id(node)}/system")
        open_ = [each for each in found["updates"] if each["state"] == "open"]
        if watch and open_:
            update = _follow_one(client, open_[0], within_s, as_json)
            with contextlib.suppress(ServerUnreachable):  # the update has been seen to its end all the same
                found = client.get(f"/nodes/{ids.node_id(node)}/system")
    show(found, as_json, lambda: tables(found))
    if update is not None and update["outcome"] not in GOOD:
        _explain(update, within)


def cold_boot(
    context: typer.Context,
    node: NodeArgument,
    at: Annotated[
        str | None, typer.Option(help="When: 2026-11-22T03:00 (here, unless it says +HH:MM), or unix time.")
    ] = None,
    in_: Annotated[str | None, typer.Option("--in", help="How long from now, like 2h.")] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Take it back.")] = False,
    as_json: AsJson = False,
) -> None:
    """Have a node prove that its firmware starts the system that runs: it reboots, and falls back if that is not so."""
    with plain_errors(as_json):
        if sum((at is not None, in_ is not None, cancel)) > 1:
            raise InputError("bad-options", "cannot tell when: expected one of --at, --in and --cancel")
        moment = _moment(at, in_)
    with connected(context) as client:
        if cancel:
            done = client.delete(f"/nodes/{ids.node_id(node)}/cold-boot")
        else:
            done = client.post(f"/nodes/{ids.node_id(node)}/cold-boot", {"at": moment})
    said = "no cold boot is wanted any more" if cancel else f"a cold boot is wanted {on(done['at'])}"
    show(done, as_json, lambda: f"{said} of {node}")


def _moment(at: str | None, in_: str | None) -> float | None:
    """Unix time; None for now. Raises InputError `bad-time`."""
    if in_ is not None:
        return time.time() + seconds(in_)
    if at is None:
        return None
    try:
        if re.fullmatch(r"[0-9]{9,11}(\.[0-9]{1,6})?", at):
            return float(at)
        return datetime.fromisoformat(at).timestamp()
    except (ValueError, OverflowError, OSError):
        text = f"cannot read the time: expected YYYY-MM-DDTHH:MM[:SS][+HH:MM], got {at!r}"
        raise InputError("bad-time", text) from None


# ---- following one update


def _follow_one(client: Client, update: dict[str, Any], within_s: float, quiet: bool) -> dict[str, Any]:
    """The update once it has ended, or as it is after `within_s` seconds. On stderr a bar, and each phase."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    until, said = time.monotonic() + within_s, ""
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task("", total=None)
        for view in client.follow(f"/nodes/{update['node']}/system/events", until):
            if view is None:
                continue
            update = _one(view, update["id"])
            at = view["update"] or {}
            step = str(at.get("step", "")) if at.get("generation") == update["generation"] else ""
            line = plain(line_of(update, step))
            if line != said and not quiet:
                progress.console.print(line, markup=False, highlight=False)
                said = line
            slot = f"slot {update['slot']}" if update["slot"] else "waiting"
            progress.update(task, description=slot, completed=update["done"], total=update["total"] or None)
            if update["state"] != "open":
                break
    return _settled(client, update, min(until, time.monotonic() + SETTLE_S))


def _settled(client: Client, update: dict[str, Any], until: float) -> dict[str, Any]:
    """The update as the node's report after its end shows it, if that comes soon."""
    while update["state"] == "confirmed" and update["mode"] != "none" and time.monotonic() < until:
        with contextlib.suppress(ServerUnreachable):
            view = client.get(f"/nodes/{update['node']}/system")
            update = _one(view, update["id"])
            if (view["told"] or 0.0) >= update["ended"]:
                break
        time.sleep(0.25)
    return update


def _one(view: dict[str, Any], id_: str) -> dict[str, Any]:
    """Raises InputError `gone`: many others were ordered since."""
    for each in view["updates"]:
        if each["id"] == id_:
            found: dict[str, Any] = each
            return found
    raise InputError("gone", f"cannot follow {id_}: it is no longer among the last updates")


def _explain(update: dict[str, Any], within: str) -> None:
    """One line on stderr with the reason, one with the way out; and exit."""
    for line in explanation(update, within):
        typer.echo(plain(line), err=True)
    raise typer.Exit(NOT_WELL)
