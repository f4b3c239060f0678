"""Rules of secrets that are handed out: enrolment tokens and the operators' API tokens.

A secret is 256 random bits, so one SHA-256 is enough to store it safely; only the hash is kept.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from instar_server.domain.errors import Forbidden

ROLES = ("viewer", "operator", "admin")
MAX_TOKEN = 200  # characters that are looked at


@dataclass(frozen=True, slots=True)
class EnrolmentToken:
    """`uses_left` counts down; `expires` is unix time."""

    id: str
    group: str
    uses_left: int
    expires: float


def secret_hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def check_usable(token: EnrolmentToken | None, now: float) -> EnrolmentToken:
    """The token, if it may enrol one more node now. Raises Forbidden with the protocol's codes."""
    if token is None:
        raise Forbidden("token-unknown", "cannot enrol: the token is not known here")
    if token.expires <= now:
        raise Forbidden("token-expired", f"cannot enrol: the token {token.id} has expired")
    if token.uses_left < 1:
        raise Forbidden("token-used-up", f"cannot enrol: the token {token.id} has no use left")
    return token


def allows(role: str, needed: str) -> bool:
    """Whether `role` may do what needs `needed`: each role may do all that the ones before it may."""
    return ROLES.index(role) >= ROLES.index(needed)
