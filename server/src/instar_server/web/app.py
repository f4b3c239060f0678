"""The FastAPI application: its errors, its callers, its parts."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from instar.core.errors import InstarError
from instar_server import VERSION
from instar_server.statuses import headers_of, status_of
from instar_server.web import (
    jobs,
    nodes,
    operators,
    releases,
    system,
    systems,
    tokens,
    transfers,
    wishes,
    wording,
)
from instar_server.web.services import WebServices

DOCUMENT = "/api/v1/openapi.json"


def make_app(services: WebServices) -> FastAPI:
    app = FastAPI(
        title="Instar",
        version=VERSION,
        summary="Operators' API of an Instar server",
        docs_url=None,
        redoc_url=None,
        openapi_url=DOCUMENT,
        redirect_slashes=False,
    )
    app.state.services = services
    app.add_exception_handler(InstarError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    for part in (system, nodes, transfers, systems, jobs, tokens, operators, wishes, releases):
        app.include_router(part.router, prefix="/api/v1")
    return app


def error_answer(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)


async def _refused(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, InstarError)
    return error_answer(status_of(error), error.code, error.text, headers_of(error))


async def _invalid(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    return error_answer(422, "bad-request", wording.invalid(found[0] if found else {}))


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
    headers = dict(error.headers) if error.headers else None
    text = f"cannot serve: {error.detail}"
    if error.status_code in (404, 405):  # no route: the API's own refusals are InstarErrors
        text = (
            f"cannot serve {request.method:.20} {request.url.path!a:.120}: see {DOCUMENT} for what there is"
        )
    return error_answer(error.status_code, code, text, headers)
