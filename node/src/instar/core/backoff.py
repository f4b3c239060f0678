"""How long to wait before the next try. Pure: chance is an argument."""

from __future__ import annotations


class Backoff:
    """Waits that grow from `floor_s` by `factor` up to `cap_s`, each spread over its upper half.

    >>> b = Backoff(1.0, 2.0, 5.0)
    >>> [b.next(1.0), b.next(0.0), b.next(1.0), b.next(1.0)]
    [1.0, 1.0, 4.0, 5.0]
    """

    def __init__(self, floor_s: float, factor: float = 2.0, cap_s: float = 60.0) -> None:
        if floor_s <= 0 or factor < 1 or cap_s < floor_s:
            raise ValueError(f"cannot make a backoff: expected 0 < floor <= cap, got {floor_s}, {cap_s}")
        self.floor_s, self.factor, self.cap_s = floor_s, factor, cap_s
        self._wait_s = floor_s

    def next(self, random01: float) -> float:
        """Seconds to wait now; `random01` is drawn from [0, 1]. Never below the floor."""
        wait = self._wait_s
        self._wait_s = min(self.cap_s, wait * self.factor)
        return max(self.floor_s, wait * (0.5 + random01 / 2))

    def reset(self) -> None:
        self._wait_s = self.floor_s
