"""A place of its own in the cgroups of this machine for each container.

systemd-nspawn puts a container below `payload` of the cgroup that it is started from. Two that are started from
the same place would share that: the one's systemd would then end what runs in the other's services.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

CGROUPS = Path("/proc/self/cgroup")
MOUNTS = Path("/proc/self/mounts")


class Room:
    """`entrances` are the files that take a process into it; none where this machine's cgroups cannot be found."""

    def __init__(self) -> None:
        name = f"instar-lab-{uuid.uuid4().hex[:12]}"
        self._folders = [place / name for place in _places()]
        for folder in self._folders:
            folder.mkdir()

    @property
    def entrances(self) -> list[str]:
        return [str(folder / "cgroup.procs") for folder in self._folders]

    def remove(self) -> None:
        """When nothing is in it any more."""
        for folder in self._folders:
            for path, _, _ in os.walk(folder, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(path)


def _places() -> list[Path]:
    """Our own cgroups, in the hierarchies that a systemd uses: version 2, and version 1 by the name `systemd`."""
    found = []
    ours = dict(line.split(":", 2)[1:] for line in CGROUPS.read_text().splitlines())
    for line in MOUNTS.read_text().splitlines():
        _, mounted, kind, options, *_ = line.split()
        own = ours.get("") if kind == "cgroup2" else ours.get("name=systemd")
        if own is not None and (
            kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(","))
        ):
            place = Path(f"{mounted}{own}")
            if place not in found and os.access(place, os.W_OK):
                found.append(place)
    return found
