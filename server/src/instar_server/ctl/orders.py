"""What `instarctl job` and `instarctl restart` share: for whom, how it goes, what came of it."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from instar.core.errors import InputError
from instar_server.ctl import ids
from instar_server.ctl.client import Client
from instar_server.ctl.output import console, make_table, print_whole
from instar_server.ctl.tokens import seconds

Nodes = Annotated[list[str] | None, typer.Option("--node", help="A node's id; several times for several.")]
GroupName = Annotated[str | None, typer.Option("--group", help="Every node that is in this group now.")]
All = Annotated[bool, typer.Option("--all", help="Every node.")]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        help="name=value: os, arch, version, python or a fact of the enrolment. All given must hold.",
    ),
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Only order it; 'job show' tells later.")]
OPEN = frozenset({"queued", "sent", "taken", "running"})
MOST_SHOWN = 60  # rows of a live table; beyond that only those that run or failed
WIDTH = 100  # characters of an answer in a table
_COLOURS = {
    "done": "green",
    "failed": "red",
    "lost": "red",
    "lapsed": "yellow",
    "cancelled": "yellow",
    "running": "cyan",
}


def select(nodes: list[str] | None, group: str | None, all_: bool, where: list[str] | None) -> dict[str, Any]:
    """The API's `select`. Raises InputError `bad-options`, `bad-id`."""
    given = [bool(nodes), group is not None, all_]
    if sum(given) > 1 or not (any(given) or where):
        raise InputError(
            "bad-options", "cannot tell for whom: expected one of --node, --group and --all, or --where"
        )
    chosen: dict[str, Any] = {"where": dict(pair(word, "--where") for word in where or ())}
    if nodes:
        chosen["nodes"] = [ids.node_id(node) for node in nodes]
    elif group is not None:
        chosen["group"] = group
    else:
        chosen["all"] = True
    return chosen


def pair(word: str, what: str) -> tuple[str, str]:
    """name=value. Raises InputError `bad-options`."""
    name, separator, value = word.partition("=")
    if not separator or not name:
        raise InputError("bad-options", f"cannot read {what}: expected name=value, got {word!r}")
    return name, value


def wait_s(wait: str | None, deadline_s: float) -> float:
    """How long to wait for answers: by default a little longer than the job may take."""
    return seconds(wait) if wait is not None else deadline_s + 30.0


# ---- while it goes


class Progress:
    """The rows of an order as its events tell of them."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order
        self.rows: dict[str, dict[str, Any]] = {}
        self.ended = False

    def hear(self, event: dict[str, Any]) -> str:
        """Take an event in; a line to print, or ''."""
        if event["kind"] == "end":
            self.ended = True
        elif event["kind"] == "row":
            self.rows.setdefault(event["node"], {}).update(event)
        elif event["kind"] == "output":
            row = self.rows.setdefault(event["node"], {"node": event["node"], "state": "running"})
            if event["what"] == "progress":
                row["progress"], row["doing"] = event["fraction"], event["text"]
            else:
                return f"{event['node']}  {event['text']}"
        return ""

    def table(self) -> RenderableType:
        counts = Counter(row["state"] for row in self.rows.values())
        rows = [self.rows[node] for node in sorted(self.rows)]
        if len(rows) > MOST_SHOWN:
            rows = [row for row in rows if row["state"] in ("running", "failed", "lost")][:MOST_SHOWN]
        shown = [(row["node"], coloured(row["state"]), _doing(row)) for row in rows]
        table = make_table(("node", "state", "answer"), shown)
        return Group(table, Text(f"{self._order['id']}: {summary(counts)}"))


def follow(client: Client, order: dict[str, Any], within_s: float, live: bool) -> None:
    """Show how an order goes until all its rows have ended, or `within_s` seconds have passed."""
    progress, until = Progress(order), time.monotonic() + within_s
    shown = console(stderr=True)
    with Live(
        console=shown, refresh_per_second=8, transient=True, auto_refresh=live and shown.is_terminal
    ) as screen:
        for event in client.follow(f"/jobs/{order['id']}/events", until):
            line = progress.hear(event) if event is not None else ""
            if live and line:
                shown.print(Text(line))
            screen.update(progress.table() if live and shown.is_terminal else "")
            if progress.ended:
                return


def whole(client: Client, id_: str) -> dict[str, Any]:
    """An order with all its rows."""
    order: dict[str, Any] = client.get(f"/jobs/{id_}")
    after = order["next"]
    while after is not None:
        page = client.get(f"/jobs/{id_}", after=after)
        order["rows"] += page["rows"]
        after = page["next"]
    order["next"] = None
    return order


# ---- what came of it


def answers(order: dict[str, Any]) -> RenderableType:
    """The rows as a table; the answer of a single one in full."""
    rows = [(row["node"], coloured(row["state"]), _seconds(row), _answer(row)) for row in order["rows"]]
    table = make_table(("node", "state", "seconds", "answer"), rows)
    parts: list[RenderableType] = [table, Text(f"{order['id']}: {summary(order['states'])}")]
    if len(order["rows"]) == 1:
        parts.append(one_answer(order["rows"][0]))
    return Group(*parts)


def one_answer(row: dict[str, Any]) -> RenderableType:
    """All that is known of a row."""
    told = [
        ("why", f"{row['code']}: {row['text']}" if row["code"] else ""),
        (
            "exit",
            f"status {row['exit_code']}, signal {row['signal']}" if row["exit_code"] or row["signal"] else "",
        ),
        ("said", row["output"].rstrip()),
        ("stderr", row["stderr"].rstrip()),
    ]
    parts: list[RenderableType] = [Text(f"{name}: {text}") for name, text in told if text]
    if row["reply"]:
        parts.append(Text(json.dumps(row["reply"], indent=2, ensure_ascii=False)))
    return Group(*parts)


def head(order: dict[str, Any]) -> Table:
    """What was ordered."""
    asked = " ".join(f"{name}={json.dumps(value)}" for name, value in order["args"].items())
    rows = [
        ("what", f"{order['name']} {order['version']}".strip()),
        ("with", asked),
        ("for", f"{json.dumps(order['select'])}: {order['nodes']} nodes"),
        ("by", order["made_by"]),
        ("cancelled", f"by {order['cancelled_by']}" if order["cancelled_at"] else ""),
    ]
    return make_table(("order", order["id"]), [row for row in rows if row[1]])


def finish(order: dict[str, Any], as_json: bool) -> None:
    """Print what came of an order, and end with 0 when every node did it and 1 otherwise."""
    if as_json:
        typer.echo(json.dumps(order, indent=2, sort_keys=True))
    else:
        print_whole(answers(order))
        if order["open"]:
            text = (
                f"{order['open']} of {order['nodes']} have not ended; see 'instarctl job show {order['id']}'"
            )
            typer.echo(text, err=True)
    if order["states"].get("done", 0) != order["nodes"]:
        raise typer.Exit(1)


def summary(counts: dict[str, int] | Counter[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "no rows"


def coloured(state: str) -> Text:
    return Text(state, style=_COLOURS.get(state, ""))


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['seconds']:.2f}" if row["ok"] is not None else ""


def _answer(row: dict[str, Any]) -> str:
    if row["ok"]:
        return _short(json.dumps(row["reply"], ensure_ascii=False))
    return _short(f"{row['code']}: {row['text']}") if row["code"] else ""


def _doing(row: dict[str, Any]) -> str:
    if row["state"] in OPEN:
        fraction = row.get("progress", -1.0)
        percent = f"{fraction:.0%} " if fraction >= 0 else ""
        return _short(percent + row.get("doing", ""))
    if row.get("code"):
        return _short(f"{row['code']}: {row.get('text', '')}")
    return _short(json.dumps(row["reply"], ensure_ascii=False)) if row.get("reply") else ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
