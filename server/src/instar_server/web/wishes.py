"""What is wanted to run where."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query

from instar_server.web import models as m
from instar_server.web.callers import Operator, Services, Viewer, errors

router = APIRouter(tags=["wishes"])


@router.get("/wishes", responses=errors(401))
async def list_wishes(services: Services, caller: Viewer) -> m.Wishes:
    """All wishes, by scope, subject and line."""
    return m.Wishes(wishes=[m.Wish.model_validate(asdict(wish)) for wish in await services.wishes.all()])


@router.put("/wishes", responses=errors(400, 401, 403, 404, 422))
async def put_wishes(services: Services, caller: Operator, body: m.WishBody) -> m.Wishes:
    """Want a published release for lines of a group or node. The same wish again makes nodes try again."""
    lines = [str(line) for line in body.lines]
    made = await services.wishes.put(body.scope, body.subject, lines, body.version, caller.id, body.via)
    return m.Wishes(wishes=[m.Wish.model_validate(asdict(wish)) for wish in made])


@router.delete("/wishes", responses=errors(401, 403, 404, 422))
async def delete_wishes(
    services: Services,
    caller: Operator,
    scope: m.Scope,
    subject: m.GroupName,
    line: Annotated[list[m.Line], Query(min_length=1, max_length=32)],
) -> m.Deleted:
    """Take wishes back. Nodes stay on what they run."""
    await services.wishes.remove(scope, subject, [str(each) for each in line])
    return m.Deleted()
