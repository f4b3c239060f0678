"""What `instarctl` says of a node's operating system: its slots, one update of it, and the way out if that failed."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from rich.console import Group
from rich.table import Table

from instar_server.ctl.output import make_table, short, when

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
    "lapsed": "see that the node is connected, and give the same order again",
    "revoked": "a revoked node is not served any more; its machine can enrol anew",
    "unknown-slot": "the node does not run from one of its slots: look at its disk and at [os] in its config.toml",
}
USUAL_WAY_OUT = "'instarctl nodes history {node}' says what happened; the same order again tries it anew"


def line_of(update: dict[str, Any], step: str) -> str:
    slot = f" in slot {update['slot']}" if update["slot"] else ""
    doing = update["outcome"] or update["phase"] or "ordered"
    at = f", {step}" if step and not update["outcome"] else ""
    return f"{update['name']} {update['version']} by {update['mode']}{slot}: {doing}{at}{_why(update)}"


def _why(update: dict[str, Any]) -> str:
    return f": {update['code']} {update['text']}".rstrip() if update["code"] else ""


def said_of(update: dict[str, Any]) -> str:
    what = f"{update['id']}: {update['name']} {update['version']} for {update['node']}"
    if not update["outcome"]:
        return f"{what} is {update['phase'] or 'ordered'}; 'instarctl node system {update['node']} --watch' follows it"
    slot = f" in slot {update['slot']}" if update["slot"] else ""
    return f"{what}: {update['outcome']}{slot}{_why(update)}"


def explanation(update: dict[str, Any], within: str) -> tuple[str, str]:
    """Why an update did not go well, and the way out; `within` is how long it was waited for."""
    outcome = update["outcome"] or f"not ended within {within}"
    if update["outcome"]:
        way = WAYS_OUT.get(update["code"], USUAL_WAY_OUT).format(node=update["node"])
    else:
        way = f"'instarctl node system {update['node']} --watch' goes on with it, 'node cancel-os' takes it back"
    return f"instarctl: {outcome}{_why(update)}", f"  {way}"


def tables(view: dict[str, Any]) -> Group:
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
        ("cold boot", f"{'missed, wanted' if cold['missed'] else 'wanted'} {on(cold['at'])}" if cold else ""),
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


def on(moment: float) -> str:
    return datetime.fromtimestamp(moment).astimezone().strftime("at %Y-%m-%d %H:%M:%S %Z")
