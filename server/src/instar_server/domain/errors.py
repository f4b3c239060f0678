"""What the server says no to, beyond the errors that node and server share. Each class is one kind of answer."""

from __future__ import annotations

from instar.core.errors import InputError, InstarError


class NotFound(InputError):
    """What the caller named does not exist."""


class Conflict(InputError):
    """The request does not fit what is there now."""


class Forbidden(InstarError):
    """Known or unknown, this caller may not do this."""


class Unauthenticated(InstarError):
    """The caller has not shown who it is."""


class TooMany(InstarError):
    """The caller has used up its share for now; it may come back later."""


class TooLarge(InputError):
    """The body is over its limit."""
