"""Enrolment tokens and API tokens. A secret is shown once, when it is made."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter

from instar_server.web import models as m
from instar_server.web.callers import Admin, Operator, Services, errors

router = APIRouter(tags=["tokens"])


@router.get("/tokens", responses=errors(401, 403))
async def list_tokens(services: Services, caller: Operator) -> m.Tokens:
    """Enrolment tokens, oldest first."""
    return m.Tokens(tokens=[m.Token(**asdict(row)) for row in await services.enrolment.tokens()])


@router.post("/tokens", status_code=201, responses=errors(400, 401, 403, 422))
async def make_token(services: Services, caller: Operator, body: m.TokenBody) -> m.NewToken:
    """A token with which `uses` machines may enrol into a group (made if it is not there)."""
    row, secret, group_made = await services.enrolment.make_token(
        body.group, body.uses, body.lifetime_s, body.label, caller.id
    )
    return m.NewToken(**asdict(row), token=secret, group_made=group_made)


@router.delete("/tokens/{token}", responses=errors(401, 403, 404, 422))
async def delete_token(services: Services, caller: Operator, token: m.TokenId) -> m.Deleted:
    """Nobody enrols with this token any more; nodes that did stay."""
    await services.enrolment.remove_token(token)
    return m.Deleted()


@router.get("/api-tokens", responses=errors(401, 403))
async def list_api_tokens(services: Services, caller: Admin) -> m.ApiTokens:
    """API tokens, oldest first."""
    return m.ApiTokens(tokens=[m.ApiToken(**asdict(row)) for row in await services.access.all()])


@router.post("/api-tokens", status_code=201, responses=errors(400, 401, 403, 422))
async def make_api_token(services: Services, caller: Admin, body: m.ApiTokenBody) -> m.NewApiToken:
    """A token for this API."""
    row, secret = await services.access.make(body.role, body.label)
    return m.NewApiToken(**asdict(row), token=secret)


@router.delete("/api-tokens/{token}", responses=errors(401, 403, 404, 409, 422))
async def delete_api_token(services: Services, caller: Admin, token: m.TokenId) -> m.Deleted:
    """This token is of no use any more. The last admin's cannot be deleted."""
    await services.access.remove(token)
    return m.Deleted()
