"""How many wrong tokens are borne: from one source, and from all together.

A leaky bucket each: every wrong token adds one, and they drain over the window. Who has filled a bucket
is told how long to stay away. A source is an IPv4 address or an IPv6 /64, since whoever has one address
of a /64 has all of them.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

WINDOW_S = 60.0
RETRY_FLOOR_S = 5.0
IN_ALL = 60  # so many sources may be at their own bound at once
MOST_SOURCES = 4096  # kept in memory


def source_of(address: str | None) -> str:
    """The source that an address belongs to; what is no address is one source of its own."""
    try:
        ip = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return ""
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((ip, 64), strict=False))


class _Bucket:
    __slots__ = ("at", "level")

    def __init__(self, now: float) -> None:
        self.level, self.at = 0.0, now

    def drain(self, size: int, now: float) -> float:
        self.level = max(0.0, self.level - max(0.0, now - self.at) * size / WINDOW_S)
        self.at = now
        return self.level


class Guesses:
    """`most`: wrong tokens that one source may send in a window. Times are unix seconds."""

    def __init__(self, most: int, in_all: int | None = None) -> None:
        self._most, self._in_all = most, in_all or most * IN_ALL
        self._sources: OrderedDict[str, _Bucket] = OrderedDict()  # the one that was wrong last is last
        self._all = _Bucket(0.0)

    def __len__(self) -> int:
        return len(self._sources)

    def wait_s(self, source: str, now: float) -> float:
        """How long the source must stay away; 0: it may try."""
        waits = [_wait(self._all, self._in_all, now)]
        if source in self._sources:
            waits.append(_wait(self._sources[source], self._most, now))
        longest = max(waits)
        return max(RETRY_FLOOR_S, longest) if longest > 0 else 0.0

    def wrong(self, source: str, now: float) -> None:
        """Count one wrong token."""
        bucket = self._sources.pop(source, None) or _Bucket(now)
        self._sources[source] = bucket
        while len(self._sources) > MOST_SOURCES:
            self._sources.popitem(last=False)
        for each, size in ((bucket, self._most), (self._all, self._in_all)):
            each.drain(size, now)
            each.level += 1


def _wait(bucket: _Bucket, size: int, now: float) -> float:
    over = bucket.drain(size, now) + 1 - size
    return over * WINDOW_S / size if over > 1e-9 else 0.0
