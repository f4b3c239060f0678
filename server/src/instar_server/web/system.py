"""Whether the server is well, and what happens right now."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from instar.core.errors import MachineError
from instar_server import VERSION
from instar_server.bus.api import FLEET, Bus
from instar_server.web import models as m
from instar_server.web.callers import Services, Viewer, errors
from instar_server.web.sse import STREAM, Reader, event

router = APIRouter(tags=["system"])


@router.get("/health")
async def health() -> m.Health:
    """The process answers."""
    return m.Health(ok=True, version=VERSION)


@router.get("/ready", responses=errors(503))
async def ready(services: Services) -> m.Ready:
    """The database answers too."""
    try:
        async with services.database.read() as connection:
            await connection.execute(text("SELECT 1"))
    except SQLAlchemyError as error:
        raise MachineError("not-ready", f"cannot reach the database: {error}") from error
    return m.Ready(ok=True, version=VERSION, connected=services.presence.count())


@router.get("/stream", response_class=StreamingResponse, responses={200: STREAM, **errors(401, 422)})
async def stream(
    services: Services,
    caller: Viewer,
    for_s: Annotated[float, Query(ge=0, le=3600, description="End after so many seconds.")] = 300.0,
) -> StreamingResponse:
    """What changes in the fleet, as it changes. A reader that is too slow is cut off."""
    return StreamingResponse(_changes(services.bus, for_s), media_type="text/event-stream")


async def _changes(bus: Bus, for_s: float) -> AsyncIterator[str]:
    reader = Reader(bus, FLEET)
    try:
        yield ": connected\n\n"
        async for body in reader.bodies(for_s):
            yield event(body)
    finally:
        reader.close()
