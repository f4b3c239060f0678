"""What a request of a wrong form is told: each pattern of the API in words, so that no answer shows a pattern.

A test reads every pattern in the OpenAPI document, and fails when one has no words here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import StringConstraints

from instar_server.domain import names
from instar_server.web import models as m
from instar_server.web import order_models as om

MOST_GOT = 80  # characters of what came
MOST_TEXT = 500

_NAME = "a name of 1 to 63 lower-case letters, digits, '.', '_' and '-' that begins with a letter or digit"


def _pattern(kind: Any) -> str:
    """The pattern of a type of the models."""
    found = next(each.pattern for each in get_args(kind)[1:] if isinstance(each, StringConstraints))
    assert isinstance(found, str)
    return found


_WORDS = {
    _pattern(m.NodeId): "a node's id, such as n-0123456789abcdef",
    _pattern(om.OrderId): "an order's id, such as o-0123456789abcdef01234567",
    _pattern(m.TokenId): "a token's id: 1 to 16 lower-case hexadecimal digits",
    _pattern(m.GroupName): _NAME,
    f"^$|{names.GROUP_PATTERN}": f"{_NAME}, or nothing",
    _pattern(m.Line): "a line: agent, updater or module/NAME, such as module/service.status",
    _pattern(
        om.ModuleName
    ): "a module's name, such as interfaces.list: lower-case words joined by '.' or '-'",
    _pattern(m.Version): "a version such as 1.2.3: 1 to 64 letters, digits, '.', '+', '_' and '-'",
    _pattern(m.Sha256): "64 hexadecimal digits in lower case",
    _pattern(m.Serial): "a certificate's serial: 1 to 40 hexadecimal digits in upper case",
    _pattern(m.Label): "text without control characters",
}
ANY_OTHER = "another form"


def expected(pattern: str) -> str:
    """In words, what a pattern takes; ANY_OTHER for one that is not known here."""
    return _WORDS.get(pattern, ANY_OTHER)


def invalid(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors as a text, bounded and printable. Its own words do, except for a pattern."""
    where = ascii(".".join(str(part) for part in error.get("loc", ())))[1:-1][:MOST_GOT]
    what = str(error.get("msg", "not valid"))
    if error.get("type") == "string_pattern_mismatch":
        what = f"expected {expected(error['ctx']['pattern'])}, got {error['input']!a:.{MOST_GOT}}"
    return f"cannot use the request: {where}: {what}".encode("utf-8", "replace").decode()[:MOST_TEXT]
