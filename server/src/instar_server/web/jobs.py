"""Orders: jobs and restarts, and how they go."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import StreamingResponse

from instar_server.bus.api import order_topic
from instar_server.domain.orders import OPEN
from instar_server.services.orders import JobOrder, OrderView, RestartOrder
from instar_server.web import models as m
from instar_server.web import order_models as om
from instar_server.web.callers import Operator, Services, Viewer, errors
from instar_server.web.services import WebServices
from instar_server.web.sse import STREAM, Reader, event

router = APIRouter(tags=["jobs"])

OrderPath = Annotated[om.OrderId, Path(description="The order's id.")]


def _answer(view: OrderView) -> Response:
    """As the model has it: it is made from the very same fields, and not checked once more. An order of
    two hundred rows would spend more time in that than in all the rest."""
    return Response(msgspec.json.encode(om.order_of(view)), media_type="application/json")


@router.post("/jobs", response_model=om.Order, responses=errors(400, 401, 403, 404, 409, 422))
async def order_job(services: Services, caller: Operator, body: om.JobBody) -> Response:
    """Run a module once on every node that is meant."""
    wanted = JobOrder(
        body.module, body.select.selector(), body.args, body.version or "", body.deadline_s, body.lapse_s
    )
    return _answer(await services.orders.job(wanted, caller.id, body.wait_s))


@router.post("/restarts", response_model=om.Order, responses=errors(400, 401, 403, 404, 409, 422))
async def order_restart(services: Services, caller: Operator, body: om.RestartBody) -> Response:
    """Restart modules, or the agent with all of them, on every node that is meant."""
    wanted = RestartOrder(body.select.selector(), list(body.modules), body.agent, body.within_s, body.lapse_s)
    return _answer(await services.orders.restart(wanted, caller.id, body.wait_s))


@router.get("/jobs", response_model=om.Orders, responses=errors(401, 422))
async def list_orders(
    services: Services,
    caller: Viewer,
    kind: Annotated[Literal["job", "command"] | None, Query(description="Only these.")] = None,
    before: Annotated[om.OrderId | None, Query(description="Only orders older than this one.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Any:
    """Jobs and restarts, newest first, without their rows."""
    views = await services.orders.page(before or "", limit, kind)
    last = views[-1].order.id if len(views) == limit else None
    return {"orders": [om.order_of(view) for view in views], "next": last}


@router.get("/jobs/{order}", response_model=om.Order, responses=errors(401, 404, 422))
async def show_order(
    services: Services,
    caller: Viewer,
    order: OrderPath,
    after: Annotated[m.NodeId | None, Query(description="Only rows of nodes after this one.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> Response:
    """An order and its rows, by node."""
    return _answer(await services.orders.view(order, after or "", limit))


@router.post("/jobs/{order}/cancel", response_model=om.Order, responses=errors(401, 403, 404, 422))
async def cancel_order(services: Services, caller: Operator, order: OrderPath) -> Response:
    """Cancel it: what no node has taken at once, the rest when its nodes have heard of it."""
    return _answer(await services.orders.cancel(order, caller.id))


@router.get(
    "/jobs/{order}/events", response_class=StreamingResponse, responses={200: STREAM, **errors(401, 404, 422)}
)
async def watch_order(
    services: Services,
    caller: Viewer,
    order: OrderPath,
    for_s: Annotated[float, Query(ge=0, le=3600, description="End after so many seconds.")] = 300.0,
) -> StreamingResponse:
    """How an order goes: every row as it is, then each change (`row`), what the jobs say (`output`), and `end`
    when the last row has ended. A reply that is large is left out; ask for the order then."""
    await services.orders.states(order)  # a 404 while one can still be given
    return StreamingResponse(_watch(services, order, for_s), media_type="text/event-stream")


async def _watch(services: WebServices, order: str, for_s: float) -> AsyncIterator[str]:
    reader = Reader(services.bus, order_topic(order))  # before the look, so that nothing falls in between
    try:
        states = await services.orders.states(order)
        open_ = {id_ for id_, _, state in states if state in OPEN}
        for id_, node, state in states:
            yield event({"kind": "row", "id": id_, "node": node, "state": state, "ended": id_ not in open_})
        if open_:
            async for body in reader.bodies(for_s):
                yield event(body)
                if body is not None and body.get("ended"):
                    open_.discard(body["id"])
                if not open_:
                    break
        if not open_:
            yield event({"kind": "end"})
    finally:
        reader.close()
