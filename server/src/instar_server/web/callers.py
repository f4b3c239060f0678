"""Who asks, and the error answers that every call documents."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from instar_server.storage.rows import ApiTokenRow
from instar_server.web.models import ErrorBody
from instar_server.web.services import WebServices

bearer = HTTPBearer(auto_error=False, description="An API token (instarctl api-tokens).")

_WHY = {
    400: "What was asked for does not fit",
    401: "No API token, or an unknown one",
    403: "This token's role may not do this",
    404: "There is no such thing",
    409: "It does not fit what is there now",
    412: "It cannot be done with this node as it is",
    413: "The body is too large",
    422: "The request has a wrong form",
    429: "Too much at once",
    503: "The server's machine cannot do it now",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a call, for the OpenAPI document."""
    return {status: {"model": ErrorBody, "description": _WHY[status]} for status in statuses}


async def services(request: Request) -> WebServices:
    """Async although it waits for nothing: FastAPI would give a plain function a thread for every request."""
    found: WebServices = request.app.state.services
    return found


Services = Annotated[WebServices, Depends(services)]


def needs(role: str) -> Callable[..., Awaitable[ApiTokenRow]]:
    async def caller(
        found: Services, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
    ) -> ApiTokenRow:
        return await found.access.check(credentials.credentials if credentials else None, role)

    return caller


Viewer = Annotated[ApiTokenRow, Depends(needs("viewer"))]
Operator = Annotated[ApiTokenRow, Depends(needs("operator"))]
Admin = Annotated[ApiTokenRow, Depends(needs("admin"))]
