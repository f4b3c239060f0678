"""Kills the process, or writes down where it is, at the program's named points (`instar.host.points`).

The plan is `<state>/lab-kill-plan.json`, or else the file that INSTAR_LAB_KILL_PLAN names:

    {"kills": [{"role": "updater", "point": "journal:verified", "count": 1}, …], "record": "/file" or absent}

Kills happen in their order: the second is armed once the first has happened. `count` is the arrival at the
point, of all processes together, at which the kill happens. Arrivals and kills are counted in files beside
the plan, by their size, so that they outlive every process. `role` is the entry point, with `-rehearse`
behind it for a rehearsal. With `record`, each arrival adds a line `role point` to that file.
"""

import json
import os
import signal
from typing import Any

VARIABLE = "INSTAR_LAB_KILL_PLAN"
FILE = "lab-kill-plan.json"


def start(argv: list[str]) -> None:
    place = find_plan(argv)
    if place is None or not argv:
        return
    from instar.host import points

    role = argv[0] + ("-rehearse" if "--rehearse" in argv else "")
    points.listener = lambda point: arrived(place, role, point)


def find_plan(argv: list[str]) -> str | None:
    """A plan that is not there yet may come while the program runs."""
    named = os.environ.get(VARIABLE)
    if "--state" in argv[:-1]:
        place = os.path.join(argv[argv.index("--state") + 1], FILE)
        if named is None or os.path.exists(place):
            return place
    return named


def arrived(place: str, role: str, point: str) -> None:
    """Called at each point. Reads the plan each time: it may change while the program runs."""
    try:
        with open(place, encoding="utf-8") as file:
            plan: dict[str, Any] = json.load(file)
    except FileNotFoundError:
        return
    if plan.get("record"):
        add(plan["record"], f"{role} {point}\n".encode())
    done = size(f"{place}.done")
    kills = plan.get("kills", [])
    if done >= len(kills):
        return
    kill = kills[done]
    if (kill["role"], kill["point"]) != (role, point):
        return
    if add(f"{place}.count-{done}", b".") == int(kill.get("count", 1)):
        add(f"{place}.done", b".")
        os.kill(os.getpid(), signal.SIGKILL)


def add(place: str, data: bytes) -> int:
    """Append and sync; the size after it."""
    fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
        os.fsync(fd)
        return os.lseek(fd, 0, os.SEEK_CUR)
    finally:
        os.close(fd)


def size(place: str) -> int:
    try:
        return os.stat(place).st_size
    except FileNotFoundError:
        return 0
