"""`instarctl updater update-os`, `system`: a node's operating system, by the node's own updater."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from instar_server.ctl.output import AsJson, make_table, plain_errors, short, show, when
from instar_server.ctl.tokens import seconds
from instar_server.ctl.updater import (
    USUAL,
    Address,
    Authority,
    Certificate,
    Folder,
    Key,
    Node,
    follow_to_end,
    updater_of,
)
from instar_server.domain.systems import PRECONDITIONS

NOT_WELL = 1


def update_os(
    node: Node,
    bundle: Annotated[
        str, typer.Option(help="NAME-VERSION, which is published, or an https URL that ends /NAME-VERSION.bundle.")
    ] = "",
    activation: Annotated[str, typer.Option(help="none, reboot or kexec; must be given.")] = "",
    override_cold_boot: Annotated[
        bool, typer.Option("--override-cold-boot", help="Also if no cold boot of the system that runs was seen.")
    ] = False,
    address: Address = USUAL, cert: Certificate = None, key: Key = None, ca: Authority = None,
    operator: Folder = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended; 1 unless it went well.")] = False,
    within: Annotated[str, typer.Option(help="Wait no longer than this, the machine's boot included.")] = "30m",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Install a system in the node's other slot, and activate it."""
    said = {
        "bundle": bundle or None,
        "activation": activation or None,
        "override_cold_boot": override_cold_boot,
    }
    with plain_errors(as_json):
        within_s = seconds(within)
        updater = updater_of(address, node, cert, key, ca, operator)
        made = updater.call(
            "POST", "/v1/update-os", {name: value for name, value in said.items() if value is not None}
        )
        if not wait:
            text = f"{made['tx']}: {made['version']} ({short(made['digest'])}) by {made['activation']}"
            show(made, as_json, lambda: f"{text}; 'instarctl updater watch' follows it")
            return
        last = follow_to_end(updater.follow(made["tx"], within_s, within_s), within_s, quiet=as_json)
    if last["state"] == "confirmed":
        runs = "lies in the other slot" if made["activation"] == "none" else "runs"
        show(last, as_json, lambda: f"system {last['version']} ({short(last['digest'])}) {runs}")
        return
    if as_json:
        show(last, True, lambda: "")
    typer.echo(f"instarctl: {_why(last)}", err=True)
    raise typer.Exit(NOT_WELL)


def _why(last: dict[str, Any]) -> str:
    """As `instarctl node update-os` says it."""
    reason = last["reason"] or {"code": "reverted", "text": "it gave no reason"}
    kind = "failed-precondition" if reason["code"] in PRECONDITIONS else "unavailable"
    if any(change["state"] == "trial" for change in last["changes"]):
        kind = "reverted"
    return f"{kind}: {reason['code']} {reason['text']}"


def system(
    node: Node, address: Address = USUAL, cert: Certificate = None, key: Key = None, ca: Authority = None,
    operator: Folder = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Both slots of the node, how it would boot, and what is under way."""
    with plain_errors(as_json):
        found = updater_of(address, node, cert, key, ca, operator).look("/v1/system")
    show(found, as_json, lambda: Group(*_tables(found)))


def _tables(found: dict[str, Any]) -> list[Table]:
    boot, update, error = found["boot"], found["update"], found["error"]
    rows = [
        ("runs", f"slot {found['running']}" if found["running"] else "none of the slots"),
        ("hardware", " ".join([*found["hardware"], found["arch"]]).strip()),
        ("boot order", ", ".join(boot.get("order", []))),
        ("next, once", boot.get("once", "")),
        *(("drift", each) for each in boot.get("drift", [])),
        ("cannot", f"{error['code']}: {error['text']}" if error else ""),
        ("under way", f"{update['tx']}: {update['step']}, {update['done']:,} of {update['total']:,} bytes"
         if update else ""),
    ]  # fmt: skip
    tables = [make_table(("", ""), [row for row in rows if row[1]])]
    columns = ("slot", "version", "digest", "state", "since", "started by", "cold boot", "tries", "why")
    slots = [
        (
            name, slot["version"], short(slot["digest"]), slot["state"], when(slot["since"]) if slot["since"] else "",
            slot["booted_by"], "seen" if slot["cold_boot_seen"] else "", boot.get("tries", {}).get(name, ""),
            slot["why"],
        )
        for name, slot in sorted(found["slots"].items())
    ]  # fmt: skip
    return [*tables, *([make_table(columns, slots)] if slots else [])]
