"""Errors and bodies as HTTP: one shape for every answer that is not good news."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from instar.core.errors import InputError, InstarError
from instar_server.domain.errors import TooLarge, Unauthenticated
from instar_server.statuses import headers_of, status_of

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BODY_WITHIN_S = 30.0

_CODES = {404: "not-found", 405: "method-not-allowed", 413: "body-too-large"}


def json_answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    data = msgspec.json.encode(body)
    return web.Response(body=data, status=status, headers=headers, content_type="application/json")


def error_answer(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return json_answer({"error": {"code": code, "message": message}}, status, headers)


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every refusal in the one shape of the protocol."""
    try:
        return await handler(request)
    except InstarError as error:
        # Nodes have no bearer tokens: they are not asked for one.
        headers = None if isinstance(error, Unauthenticated) else headers_of(error)
        return error_answer(status_of(error), error.code, error.text, headers)
    except ConnectionError:
        if request.transport is not None and not request.transport.is_closing():
            raise
        return error_answer(400, "client-gone", "cannot answer: the client has gone")  # for nobody; no fault
    except web.HTTPException as error:
        if error.status < 400:
            raise
        code = _CODES.get(error.status, "bad-request")
        return error_answer(
            error.status, code, f"cannot serve {request.method} {request.path[:200]}: {error.reason}"
        )


async def read_body(request: web.Request, kind: type[T], limit: int) -> T:
    """The JSON body as `kind`. Raises InputError `bad-body`, TooLarge; a slow sender gets InputError too."""
    if (request.content_length or 0) > limit:
        raise TooLarge("body-too-large", f"cannot read the body: expected at most {limit} bytes")
    try:
        async with asyncio.timeout(BODY_WITHIN_S):
            data = await request.read()
    except TimeoutError:
        raise InputError("body-too-slow", f"cannot read the body: it took over {BODY_WITHIN_S:g} s") from None
    if len(data) > limit:
        raise TooLarge(
            "body-too-large", f"cannot read the body: expected at most {limit} bytes, got {len(data)}"
        )
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InputError("bad-body", f"cannot read the body: {str(error)[:300]}") from None
