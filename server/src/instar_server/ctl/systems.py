"""`instarctl node update-os`, `system`, `cold-boot`, `cancel-os`: the operating system of a node."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from instar.core.errors import InputError, ServerUnreachable
from instar_server.ctl.client import Client
from instar_server.ctl.nodes import NodeArgument
from instar_server.ctl.output import AsJson, connected, make_table, plain_errors, short, show, when
from instar_server.ctl.tokens import seconds

PAUSE_S = 1.0  # before a broken stream is taken up again
SETTLE_S = 5.0  # for the node's report of its slots, which may come after the end of its transaction
NOT_WELL = 1
UNSEEN = "confirmed, cold boot not seen"
GOOD = frozenset({"confirmed", UNSEEN, "installed, not active"})

# What to do about a code; where there is nothing here, the history says more.
WAYS_OUT = {
    "already-running": "the node runs this system already; there is nothing to do",
    "cold-boot-not-seen": "have it proven first: instarctl node cold-boot {node}; or say --override-cold-boot",
    "wrong-hardware": "build a bundle that is compatible with what 'instarctl node system {node}' shows",
    "too-old-system": "update to a version in between first",
    "too-old-bundle": "take a newer bundle, or lower min_bundle_version in the [os] section of the node's config.toml",
    "no-slots": "say in the [os] section of the node's config.toml where its slots are, if it has any",
    "slot-too-small": "build a smaller root image; the slots of this node have no room for this one",
    "esp-full": "make room in the node's EFI system partition: two kernel images and a temporary must fit",
    "altered-bundle": "what came is not what was signed: look at the source, or publish the bundle as a new version",
    "altered-chunk": "what came is not what was signed: look at the source, then give the same order again",
    "fell-back": "the new system did not come up; its console says why. It is in quarantine for now; "
    "the same order again tries it anew",
    "left": "it was confirmed, and the node has left it since; it is in quarantine for now; "
    "the same order again tries it anew",
    "unknown-slot": "the node does not run from one of its slots: look at its disk and at [os] in its config.toml",
}
USUAL_WAY_OUT = "'instarctl nodes history {node}' says what happened; the same order again tries it anew"

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
    with plain_errors():
        within_s = seconds(within)
    body = {
        "bundle": bundle or None, "activation": activation or None, "override_cold_boot": override_cold_boot,
    }  # fmt: skip
    with connected(context) as client:
        made = client.post(f"/nodes/{node}/update-os", body)
        if wait:
            made = _follow_one(client, node, made["id"], within_s, as_json)
    show(made, as_json, lambda: _said(made))
    if wait and made["outcome"] not in GOOD:
        _explain(made, within)


def cancel_os(context: typer.Context, node: NodeArgument, as_json: AsJson = False) -> None:
    """Take the open system update of a node back, as long as the node has not switched."""
    with connected(context) as client:
        gone = client.delete(f"/nodes/{node}/update-os")
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
    with plain_errors():
        within_s = seconds(within)
    update: dict[str, Any] | None = None
    with connected(context) as client:
        found = client.get(f"/nodes/{node}/system")
        open_ = [each for each in found["updates"] if each["state"] == "open"]
        if watch and open_:
            update = _follow_one(client, node, open_[0]["id"], within_s, as_json)
            found = client.get(f"/nodes/{node}/system")
    show(found, as_json, lambda: _tables(found))
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
    with plain_errors():
        if sum((at is not None, in_ is not None, cancel)) > 1:
            raise InputError("bad-options", "cannot tell when: expected one of --at, --in and --cancel")
        moment = _moment(at, in_)
    with connected(context) as client:
        if cancel:
            done = client.delete(f"/nodes/{node}/cold-boot")
        else:
            done = client.post(f"/nodes/{node}/cold-boot", {"at": moment})
    said = "no cold boot is wanted any more" if cancel else f"a cold boot is wanted {_on(done['at'])}"
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


def _on(moment: float) -> str:
    return datetime.fromtimestamp(moment).astimezone().strftime("at %Y-%m-%d %H:%M:%S %Z")


# ---- following one update


def _follow_one(client: Client, node: str, id_: str, within_s: float, quiet: bool) -> dict[str, Any]:
    """The update once it has ended, or as it is after `within_s` seconds. On stderr a bar, and each phase."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    until, said = time.monotonic() + within_s, ""
    update = _one(client.get(f"/nodes/{node}/system"), id_)
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task("", total=None)
        for view in _views(client, node, until):
            update = _one(view, id_)
            at = view["update"] or {}
            step = str(at.get("step", "")) if at.get("generation") == update["generation"] else ""
            line = _line(update, step)
            if line != said and not quiet:
                progress.console.print(line, markup=False, highlight=False)
                said = line
            slot = f"slot {update['slot']}" if update["slot"] else "waiting"
            progress.update(task, description=slot, completed=update["done"], total=update["total"] or None)
            if update["state"] != "open":
                break
    return _settled(client, update, min(until, time.monotonic() + SETTLE_S))


def _views(client: Client, node: str, until: float) -> Iterator[dict[str, Any]]:
    """The node's system as it changes; a server that is away is waited for."""
    while (left := until - time.monotonic()) > 0:
        try:
            for event in client.events(f"/nodes/{node}/system/events", for_s=round(min(left, 3600.0), 3)):
                if event is not None:
                    yield event
                elif time.monotonic() >= until:
                    return
        except ServerUnreachable:
            time.sleep(min(PAUSE_S, max(0.0, until - time.monotonic())))


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


def _line(update: dict[str, Any], step: str) -> str:
    slot = f" in slot {update['slot']}" if update["slot"] else ""
    doing = update["outcome"] or update["phase"] or "ordered"
    at = f", {step}" if step and not update["outcome"] else ""
    return f"{update['name']} {update['version']} by {update['mode']}{slot}: {doing}{at}{_why(update)}"


def _why(update: dict[str, Any]) -> str:
    return f": {update['code']} {update['text']}".rstrip() if update["code"] else ""


def _said(update: dict[str, Any]) -> str:
    what = f"{update['id']}: {update['name']} {update['version']} for {update['node']}"
    if not update["outcome"]:
        return f"{what} is {update['phase'] or 'ordered'}; 'instarctl node system {update['node']} --watch' follows it"
    slot = f" in slot {update['slot']}" if update["slot"] else ""
    return f"{what}: {update['outcome']}{slot}{_why(update)}"


def _explain(update: dict[str, Any], within: str) -> None:
    """One line on stderr with the reason, one with the way out; and exit."""
    outcome = update["outcome"] or f"not ended within {within}"
    if update["outcome"]:
        way = WAYS_OUT.get(update["code"], USUAL_WAY_OUT).format(node=update["node"])
    else:
        way = f"'instarctl node system {update['node']} --watch' goes on with it, 'node cancel-os' takes it back"
    typer.echo(f"instarctl: {outcome}{_why(update)}", err=True)
    typer.echo(f"  {way}", err=True)
    raise typer.Exit(NOT_WELL)


# ---- showing


def _tables(view: dict[str, Any]) -> Group:
    update, boot, cold = view["update"], view["boot"], view["cold_boot"]
    tries = ", ".join(f"{slot}: {left}" for slot, left in sorted(boot["tries"].items()))
    rows = [
        ("told", when(view["told"])),
        ("runs", f"slot {view['running']}" if view["running"] else "none of the slots"),
        ("hardware", " ".join([*view["hardware"], view["arch"]]).strip()),
        (
            "chooses by",
            {"counting": "systemd-boot, counting", "firmware": "firmware entries"}.get(view["backend"], ""),
        ),
        ("boot order", ", ".join(boot["order"]) + (f"; next, once: {boot['once']}" if boot["once"] else "")),
        ("tries left", tries),
        *(("drift", each) for each in boot["drift"]),
        ("cannot", f"{view['error']['code']}: {view['error']['text']}" if view["error"] else ""),
        ("under way", _under_way(update) if update else ""),
        ("cold boot", f"wanted {_on(cold['at'])}" if cold else ""),
    ]
    head = make_table(("node", view["node"]), [row for row in rows if row[1]])
    if not view["slots"]:
        return Group(head, *([] if view["error"] else ["it has told of no slots"]), *_updates(view))
    columns = ("slot", "version", "digest", "state", "since", "started by", "cold boot", "tries", "why")
    slots = [_slot(name, slot, view) for name, slot in sorted(view["slots"].items())]
    return Group(head, make_table(columns, slots), *_updates(view))


def _slot(name: str, slot: dict[str, Any], view: dict[str, Any]) -> tuple[Any, ...]:
    return (
        f"{name} (runs)" if name == view["running"] else name, slot["version"], short(slot["digest"]),
        slot["state"], when(slot["since"]) if slot["since"] else "", slot["booted_by"],
        "seen" if slot["cold_boot_seen"] else "", view["boot"]["tries"].get(name, ""), slot["why"],
    )  # fmt: skip


def _under_way(update: dict[str, Any]) -> str:
    bytes_ = f", {update['done']:,} of {update['total']:,} bytes" if update["total"] else ""
    whose = "" if update["generation"] else ", not ordered by this server"
    return f"{update['tx']}: {update['step']} slot {update['slot'] or '?'}{bytes_}{whose}"


def _updates(view: dict[str, Any]) -> list[Table]:
    if not view["updates"]:
        return []
    columns = ("update", "system", "by", "slot", "ordered", "state", "bytes fetched", "reused", "why")
    rows = [
        (
            each["id"], f"{each['name']} {each['version']}", each["mode"], each["slot"], when(each["made"]),
            each["outcome"] or each["phase"] or "ordered", f"{each['fetched']:,}", f"{each['reused']:,}",
            f"{each['code']} {each['text']}".strip(),
        )
        for each in view["updates"]
    ]  # fmt: skip
    return [make_table(columns, rows)]
