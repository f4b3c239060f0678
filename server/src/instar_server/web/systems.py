"""The operating system of a node: update it, look at its slots, have a cold boot proven."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Path, Query
from fastapi.responses import StreamingResponse

from instar_server.bus.api import system_topic
from instar_server.domain import systems
from instar_server.services.systems import SystemView
from instar_server.web import models as m
from instar_server.web import system_models as s
from instar_server.web.callers import Operator, Services, Viewer, errors
from instar_server.web.services import WebServices
from instar_server.web.sse import STREAM, Reader, event

router = APIRouter(tags=["systems"])

NodePath = Annotated[m.NodeId, Path(description="The node's id.")]


def _answer(view: SystemView) -> s.System:
    report = view.report
    cold_boot = view.cold_boot
    return s.System(
        node=view.node,
        told=view.told,
        running=report.get("running", ""),
        hardware=report.get("hardware", []),
        arch=report.get("arch", ""),
        backend=report.get("backend", ""),
        slots=report.get("slots", {}),
        boot=s.SystemBoot(**report.get("boot", {"order": [], "once": "", "tries": {}, "drift": []})),
        update=s.UnderWay(**report["update"]) if report.get("update") else None,
        error=s.Fault(**report["error"]) if report.get("error") else None,
        updates=[s.SystemUpdate(**each) for each in systems.all_as_json(view.updates, report)],
        cold_boot=s.ColdBoot(**cold_boot._asdict()) if cold_boot else None,
    )


@router.post(
    "/nodes/{node}/update-os", status_code=202, responses=errors(400, 401, 403, 404, 409, 412, 422, 503)
)
async def update_os(
    services: Services, caller: Operator, node: NodePath, body: s.UpdateOsBody
) -> s.SystemUpdate:
    """Have a node install a system bundle in its other slot, and activate it as asked. One at a time of a node: a
    second call gets 409 `aborted`."""
    made = await services.systems.order(
        node, body.bundle, body.activation, body.override_cold_boot, caller.id
    )
    return s.SystemUpdate(**systems.as_json(made, {}))


@router.delete("/nodes/{node}/update-os", responses=errors(401, 403, 404, 412, 422))
async def cancel_update_os(services: Services, caller: Operator, node: NodePath) -> s.SystemUpdate:
    """Take the open update back. A node that has begun may still finish it; past the switch it is too
    late, unless nothing was heard of it for 2 hours."""
    return s.SystemUpdate(**systems.as_json(await services.systems.cancel(node, caller.id), {}))


@router.get("/nodes/{node}/system", responses=errors(401, 404, 422))
async def show_system(services: Services, caller: Viewer, node: NodePath) -> s.System:
    """Both slots of a node, how it would boot, and its last system updates."""
    return _answer(await services.systems.view(node))


@router.get(
    "/nodes/{node}/system/events",
    response_class=StreamingResponse,
    responses={200: STREAM, **errors(401, 404, 422)},
)
async def watch_system(
    services: Services,
    caller: Viewer,
    node: NodePath,
    for_s: Annotated[float, Query(ge=0, le=3600, description="End after so many seconds.")] = 300.0,
) -> StreamingResponse:
    """The same as `system` shows: first as it is now, then at each change (`system`)."""
    await services.systems.view(node)  # a 404 while one can still be given
    return StreamingResponse(_watch(services, node, for_s), media_type="text/event-stream")


async def _watch(services: WebServices, node: str, for_s: float) -> AsyncIterator[str]:
    reader = Reader(services.bus, system_topic(node))  # before the look, so that nothing falls in between
    try:
        yield await _shown(services, node)
        async for body in reader.bodies(for_s):
            yield event(None) if body is None else await _shown(services, node)
    finally:
        reader.close()


async def _shown(services: WebServices, node: str) -> str:
    return event({"kind": "system", **_answer(await services.systems.view(node)).model_dump()})


@router.post("/nodes/{node}/cold-boot", status_code=202, responses=errors(400, 401, 403, 404, 409, 412, 422))
async def order_cold_boot(
    services: Services, caller: Operator, node: NodePath, body: s.ColdBootBody
) -> s.ColdBoot:
    """Have a node prove that the firmware starts the system that it runs: it reboots, now or at a time, and falls
    back to the other slot if that is not so. It takes the place of one that was ordered before. A node that has not
    begun within an hour of the time does not begin any more: it is `missed`, until it is ordered again."""
    made = await services.systems.cold_boot(node, body.at, caller.id)
    return s.ColdBoot(**made._asdict())


@router.delete("/nodes/{node}/cold-boot", responses=errors(401, 403, 404, 412, 422))
async def cancel_cold_boot(services: Services, caller: Operator, node: NodePath) -> m.Deleted:
    """Take a cold boot back that the node has not begun with, or of which nothing was heard for 2 hours."""
    await services.systems.cancel_cold_boot(node, caller.id)
    return m.Deleted()
