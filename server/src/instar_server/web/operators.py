"""Certificates for the API of nodes' updaters."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field, StringConstraints

from instar_server.ca import MAX_CSR
from instar_server.domain.names import OPERATOR_PATTERN
from instar_server.web import models as m
from instar_server.web.callers import Admin, Services, errors

LEAST_S, MOST_S, USUAL_S = 60.0, 365 * 86400.0, 30 * 86400.0

router = APIRouter(tags=["operators"])


class OperatorBody(m.Body):
    """`csr` in PEM; only its key counts. `lifetime_s`: nodes cannot be told to refuse it before that is over."""

    name: Annotated[str, StringConstraints(pattern=OPERATOR_PATTERN)]
    csr: Annotated[str, StringConstraints(max_length=MAX_CSR)]
    lifetime_s: Annotated[float, Field(ge=LEAST_S, le=MOST_S)] = USUAL_S


class OperatorCertificate(BaseModel):
    """`certificate` and `ca` in PEM."""

    name: str
    serial: str
    not_after: float
    certificate: str
    ca: str


@router.post("/operators", status_code=201, responses=errors(400, 401, 403, 422))
async def issue_operator(services: Services, caller: Admin, body: OperatorBody) -> OperatorCertificate:
    """A certificate with which an operator may push releases to nodes, and roll them back, at the nodes."""
    issued, ca = services.operators.issue(body.name, body.csr, body.lifetime_s, caller.id)
    return OperatorCertificate(
        name=body.name, serial=issued.serial, not_after=issued.not_after, certificate=issued.pem, ca=ca
    )
