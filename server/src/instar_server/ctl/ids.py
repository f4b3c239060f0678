"""Ids as they are typed: looked at before anything is asked, so that who errs hears what was expected.

Each check returns the text as it is, or raises InputError `bad-id`. Paths of the API are made from checked ids only.
"""

from __future__ import annotations

import re

from instar.core.errors import InputError
from instar_server.domain.names import NODE_PATTERN, VERSION_PATTERN


def node_id(text: str) -> str:
    return _checked(NODE_PATTERN, text, "node", "a node id such as n-0123456789abcdef", "nodes list")


def order_id(text: str) -> str:
    like = "an order's id such as o-0123456789abcdef01234567"
    return _checked(r"^o-[0-9a-f]{24}$", text, "order", like, "job list")


def token_id(text: str, shown_by: str = "tokens list") -> str:
    """Of an enrolment token or an API token; not its secret."""
    return _checked(r"^[0-9a-f]{1,16}$", text, "token", "a token's id such as 0123456789ab", shown_by)


def transaction_id(text: str) -> str:
    like = "a transaction's id such as tx-0123456789abcdef"
    return _checked(r"^tx-[0-9a-f]{16}$", text, "transaction", like, "updater transactions")


def version(text: str) -> str:
    return _checked(VERSION_PATTERN, text, "release", "a version such as 1.1.0", "releases list")


def _checked(pattern: str, text: str, what: str, like: str, shown_by: str) -> str:
    if re.fullmatch(pattern.strip("^$"), text) is None:
        expected = f"expected {like}, as `instarctl {shown_by}` shows it"
        raise InputError("bad-id", f"cannot tell which {what}: {expected}, got {text[:100]!r}")
    return text
