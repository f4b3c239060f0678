"""What the server says no to, beyond the errors that node and server share. Each class is one kind of answer."""

from __future__ import annotations

from instar.core.errors import InputError, InstarError


class NotFound(InputError):
    """What the caller named does not exist."""


class Conflict(InputError):
    """The request does not fit what is there now."""


class Precondition(InputError):
    """What was asked for is well formed, and cannot be done with this node as it is."""


class Forbidden(InstarError):
    """Known or unknown, this caller may not do this."""


class Unauthenticated(InstarError):
    """The caller has not shown who it is."""


class TooMany(InstarError):
    """The caller has used up its share for now; it may come back after `retry_after_s` seconds."""

    def __init__(self, code: str, text: str, retry_after_s: float = 5.0) -> None:
        super().__init__(code, text)
        self.retry_after_s = retry_after_s


class TooLarge(InputError):
    """The body is over its limit."""
