"""The HTTP Range header, for one range of bytes (RFC 9110). Several ranges at once are served as a whole file.

>>> parse("bytes=5-", 10), parse("bytes=-3", 10), parse("lines=1-2", 10), parse("bytes=10-", 10)
((5, 10), (7, 10), None, 'unsatisfiable')
"""

from __future__ import annotations

import re
from typing import Literal

_ONE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def parse(header: str, size: int) -> tuple[int, int] | Literal["unsatisfiable"] | None:
    """(first byte, byte after the last) of a file of `size` bytes; None: serve the whole file."""
    match = _ONE.fullmatch(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        count = min(int(last), size)
        return (size - count, size) if count else "unsatisfiable"
    start, end = int(first), min(size, int(last) + 1) if last else size
    if last and int(last) < int(first):
        return None
    return (start, end) if start < size else "unsatisfiable"


def still_same(if_range: str | None, etag: str) -> bool:
    """Whether a Range may be honoured. A date is never good enough; a weak tag neither."""
    return if_range is None or if_range.strip() == etag
