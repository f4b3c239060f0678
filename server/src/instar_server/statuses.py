"""Which HTTP status and headers each kind of error has, on both ports."""

from __future__ import annotations

import math

from instar.core.errors import InputError, InstarError, MachineError, TrustError
from instar_server.domain.errors import (
    Conflict,
    Forbidden,
    NotFound,
    Precondition,
    TooLarge,
    TooMany,
    Unauthenticated,
)

_STATUS: tuple[tuple[type[InstarError], int], ...] = (
    (NotFound, 404), (Conflict, 409), (Precondition, 412), (TooLarge, 413), (InputError, 400), (TrustError, 400),
    (Forbidden, 403), (Unauthenticated, 401), (TooMany, 429), (MachineError, 503),
)  # fmt: skip


def status_of(error: InstarError) -> int:
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def headers_of(error: InstarError) -> dict[str, str]:
    if isinstance(error, TooMany):
        return {"Retry-After": str(math.ceil(error.retry_after_s))}
    return {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthenticated) else {}
