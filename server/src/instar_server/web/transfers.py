"""What is sent to nodes through their channels, and how it goes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Path, Query
from fastapi.responses import StreamingResponse

from instar_server.bus.api import transfer_topic
from instar_server.services.progress import View
from instar_server.web import models as m
from instar_server.web.callers import Operator, Services, Viewer, errors
from instar_server.web.services import WebServices
from instar_server.web.sse import STREAM, Reader, event

router = APIRouter(tags=["transfers"])

NodePath = Annotated[m.NodeId, Path(description="The node's id.")]


def _answer(view: View) -> m.Transfer:
    return m.Transfer(**asdict(view))


@router.get("/nodes/{node}/transfer", responses=errors(401, 404, 422))
async def show_transfer(services: Services, caller: Viewer, node: NodePath) -> m.Transfer:
    """What is being sent to a node, or was last since the server started."""
    await services.fleet.node(node)
    return _answer(services.board.view(node))


@router.get(
    "/nodes/{node}/transfer/events",
    response_class=StreamingResponse,
    responses={200: STREAM, **errors(401, 404, 422)},
)
async def watch_transfer(
    services: Services,
    caller: Viewer,
    node: NodePath,
    for_s: Annotated[float, Query(ge=0, le=3600, description="End after so many seconds.")] = 300.0,
) -> StreamingResponse:
    """How it goes: first as it is now, then each change (`transfer`). What ends there may be followed by the next
    try; the stream goes on."""
    await services.fleet.node(node)  # a 404 while one can still be given
    return StreamingResponse(_watch(services, node, for_s), media_type="text/event-stream")


async def _watch(services: WebServices, node: str, for_s: float) -> AsyncIterator[str]:
    reader = Reader(services.bus, transfer_topic(node))  # before the look, so that nothing falls in between
    try:
        yield event({"kind": "transfer", **asdict(services.board.view(node))})
        async for body in reader.bodies(for_s):
            yield event(body)
    finally:
        reader.close()


@router.post("/nodes/{node}/recover", responses=errors(400, 401, 403, 404, 409, 422))
async def recover_node(
    services: Services, caller: Operator, node: NodePath, body: m.RecoverBody
) -> m.Transfer:
    """Send the newest recovery core to a connected node, and have it install a release. How it goes is told by
    the node's transfer."""
    view = await services.recovering.begin(
        node, body.version or "", list(dict.fromkeys(body.lines)), caller.id
    )
    return _answer(view)
