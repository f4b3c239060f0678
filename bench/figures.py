"""One figure: what was measured, beside what is aimed at and what others do."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median


@dataclass(frozen=True, slots=True)
class Figure:
    """`values` are the single measurements in `unit`; the median counts. `aim` is what it must stay under.

    `others` names programs and what they took on a machine of the same size (docs/performance.md tells how
    those were measured); the ratio is theirs divided by ours, so more is better.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    aim: float | None = None
    others: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def value(self) -> float:
        return median(self.values)

    @property
    def met(self) -> bool | None:
        """None where there is no aim."""
        return None if self.aim is None else self.value < self.aim

    def shown(self) -> str:
        return number(self.value)

    def spread(self) -> str:
        """Least and most, where it was measured more than once."""
        if len(self.values) < 2:
            return ""
        return f"{number(min(self.values))}–{number(max(self.values))} ({len(self.values)})"

    def ratios(self) -> str:
        """A figure of 0 has no ratio: theirs stands alone."""
        return ", ".join(
            f"{name} {number(other)}" + (f" ({other / self.value:.1f}×)" if self.value else "")
            for name, other in self.others.items()
        )


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
