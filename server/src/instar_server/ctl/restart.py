"""`instarctl restart`: modules, or the agent with all of them."""

from __future__ import annotations

from typing import Annotated

import typer

from instar_server.ctl import orders
from instar_server.ctl.orders import All, GroupName, Nodes, NoWait, Where
from instar_server.ctl.output import AsJson, connected, plain_errors, show
from instar_server.ctl.tokens import seconds


def restart(
    context: typer.Context,
    node: Nodes = None,
    group: GroupName = None,
    all_: All = False,
    where: Where = None,
    module: Annotated[
        list[str] | None, typer.Option(help="Only this module; several times for several.")
    ] = None,
    agent: Annotated[
        bool | None,
        typer.Option(
            "--agent/--modules-only", help="The agent too, or not; else yes unless --module is given."
        ),
    ] = None,
    within: Annotated[
        str, typer.Option(help="Bound for the whole; what is not done by then is killed.")
    ] = "30s",
    lapse: Annotated[
        str, typer.Option(help="A node that is off until then does not restart any more.")
    ] = "1h",
    no_wait: NoWait = False,
    wait: Annotated[str | None, typer.Option(help="Wait so long, else a little over the bound.")] = None,
    as_json: AsJson = False,
) -> None:
    """Restart modules, or the agent with all its modules. Ends with 1 unless every node did it."""
    with plain_errors(as_json):
        within_s = seconds(within)
        body = {
            "select": orders.select(node, group, all_, where), "modules": module or [],
            "agent": not module if agent is None else agent, "within_s": within_s, "lapse_s": seconds(lapse),
        }  # fmt: skip
        wait_s = orders.wait_s(wait, within_s)
    with connected(context) as client:
        order = client.post("/restarts", body)
        if no_wait:
            show(order, as_json, lambda: f"{order['id']}: ordered for {order['nodes']} nodes")
            return
        orders.follow(client, order, wait_s, live=not as_json)
        orders.finish(orders.whole(client, order["id"]), as_json)
