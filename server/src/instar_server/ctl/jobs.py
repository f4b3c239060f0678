"""`instarctl job`: run modules on nodes and see the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group

from instar.core.errors import InputError
from instar_server.ctl import ids, orders, words
from instar_server.ctl.orders import All, GroupName, Nodes, NoWait, Where
from instar_server.ctl.output import AsJson, connected, make_table, plain_errors, show, when
from instar_server.ctl.tokens import seconds

app = typer.Typer(no_args_is_help=True)

Order = Annotated[str, typer.Argument(help="The order's id, o-….")]


@app.command(epilog=words.EXAMPLES["job"])
def run(
    context: typer.Context,
    module: Annotated[str, typer.Argument(help="A published module.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="name=value for the module; a value is JSON where it is, else text."),
    ] = None,
    args_file: Annotated[
        Path | None, typer.Option(help="File with the arguments as a JSON object; name=value goes on top.")
    ] = None,
    node: Nodes = None,
    group: GroupName = None,
    all_: All = False,
    where: Where = None,
    version: Annotated[str | None, typer.Option(help="Else the newest that is published.")] = None,
    deadline: Annotated[str, typer.Option(help="How long one run may take, like 30s or 5m.")] = "30s",
    lapse: Annotated[
        str, typer.Option(help="A node that is off until then does not run it any more.")
    ] = "1d",
    no_wait: NoWait = False,
    wait: Annotated[
        str | None, typer.Option(help="Wait so long for answers, else a little over the deadline.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a module once on every node that is meant, and show the answers. Ends with 1 unless all did it."""
    with plain_errors(as_json):
        deadline_s = seconds(deadline)
        body = {
            "module": module, "args": arguments_of(arguments or [], args_file), "deadline_s": deadline_s,
            "lapse_s": seconds(lapse), "select": orders.select(node, group, all_, where),
        }  # fmt: skip
        within_s = orders.wait_s(wait, deadline_s)
    if version is not None:
        body["version"] = version
    with connected(context) as client:
        order = client.post("/jobs", body)
        if no_wait:
            show(order, as_json, lambda: f"{order['id']}: ordered for {order['nodes']} nodes")
            return
        orders.follow(client, order, within_s, live=not as_json)
        orders.finish(orders.whole(client, order["id"]), as_json)


def arguments_of(pairs: list[str], file: Path | None) -> dict[str, Any]:
    """The module's arguments. Raises InputError `bad-options`, `bad-args`."""
    found: dict[str, Any] = {}
    if file is not None:
        try:
            found = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError("bad-args", f"cannot read {file}: {error}") from error
        if not isinstance(found, dict):
            raise InputError(
                "bad-args", f"cannot use {file}: expected a JSON object, got a {type(found).__name__}"
            )
    return found | {name: value_of(text) for name, text in (orders.pair(word, "arguments") for word in pairs)}


def value_of(text: str) -> Any:
    """A value as it is typed: JSON if it is, else the text itself."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except ValueError:
        return text


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


@app.command("show")
def show_order(context: typer.Context, order: Order, as_json: AsJson = False) -> None:
    """An order and what came of it so far."""
    with connected(context) as client:
        found = orders.whole(client, ids.order_id(order))
    show(found, as_json, lambda: Group(orders.head(found), orders.answers(found)))


@app.command("list")
def list_orders(
    context: typer.Context,
    limit: Annotated[int, typer.Option(help="So many.", min=1, max=200)] = 20,
    as_json: AsJson = False,
) -> None:
    """Jobs and restarts, newest first."""
    with connected(context) as client:
        found: list[dict[str, Any]] = client.get("/jobs", limit=limit)["orders"]
    columns = ("order", "when", "what", "nodes", "came of it", "by")
    rows = [
        (
            o["id"],
            when(o["made"]),
            f"{o['name']} {o['version']}",
            o["nodes"],
            orders.summary(o["states"]),
            o["made_by"],
        )
        for o in found
    ]
    show(found, as_json, lambda: make_table(columns, rows))


@app.command()
def cancel(context: typer.Context, order: Order, as_json: AsJson = False) -> None:
    """Cancel an order: nodes that have not taken it at once, the others as soon as they have heard of it."""
    with connected(context) as client:
        found = client.post(f"/jobs/{ids.order_id(order)}/cancel", {})
    show(found, as_json, lambda: f"{order}: {orders.summary(found['states'])}")
