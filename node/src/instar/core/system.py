"""What is wanted of the node's operating system: an image in its other slot, a proof of a cold boot. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from instar.core.errors import InputError
from instar.core.releases import Release

LINE = "os"
MODES = ("none", "reboot", "kexec")  # how an image is activated
SOURCE = re.compile(r"https://[^\s/?#@]+/[^\s#]+")
MOST_SOURCE = 2048


@dataclass(frozen=True, slots=True)
class SystemWish:
    """One wanted bundle. `generation` counts with those of the other lines; what was begun for one is never
    begun again for it. `source` is an https URL to fetch from, '' for the target's own place. `override`: also
    while no cold boot of what runs was seen."""

    release: Release
    target: str
    generation: int
    mode: str
    source: str = ""
    override: bool = False


@dataclass(frozen=True, slots=True)
class ColdBoot:
    """The system that runs is to prove that the firmware starts it, at `at` (unix time) or as soon as may be."""

    generation: int
    at: float


def read_system(fields: Any) -> SystemWish | None:
    """The line `os` of the server's answer; None for none. Raises InputError `bad-wanted`."""
    if fields is None:
        return None
    try:
        release = Release(str(fields["version"]), str(fields["digest"]))
        mode, source = check_mode(fields["mode"]), check_source(fields.get("source") or "")
        override = fields.get("override", False)
        if not isinstance(override, bool):
            raise ValueError(f"expected override to be true or false, got {override!r}")
        generation = int(fields["generation"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError("bad-wanted", f"cannot read the wanted system: {error!r:.300}") from None
    except InputError as error:
        raise InputError("bad-wanted", f"cannot read the wanted system: {error.text}") from None
    return SystemWish(release, str(fields["target"]), generation, mode, source, override)


def read_cold_boot(fields: Any) -> ColdBoot | None:
    """None for none. Raises InputError `bad-wanted`."""
    if fields is None:
        return None
    try:
        at = float(fields["at"])
        if not math.isfinite(at):
            raise ValueError(f"expected a time, got {at}")
        return ColdBoot(int(fields["generation"]), at)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError("bad-wanted", f"cannot read the wanted cold boot: {error!r:.300}") from None


def check_mode(mode: object) -> str:
    """Raises InputError `invalid-argument`: whoever activates must say how."""
    if mode not in MODES:
        got = "nothing" if mode is None else f"{mode!a:.60}"
        text = f"cannot update the system: expected activation {', '.join(MODES)}, got {got}"
        raise InputError("invalid-argument", text)
    return str(mode)


def check_source(source: object) -> str:
    """'' or an https URL. Raises InputError `invalid-argument`."""
    good = isinstance(source, str) and len(source) <= MOST_SOURCE and (not source or SOURCE.fullmatch(source))
    if not good:
        text = f"cannot update the system: expected a bundle at https://host[:port]/path, got {source!a:.200}"
        raise InputError("invalid-argument", text)
    return str(source)
