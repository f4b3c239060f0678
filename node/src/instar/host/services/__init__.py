"""Whoever keeps the node's daemons running: a service manager, our own keeper, or nobody.

All start `launch <role>` again whenever the role's process ends, so a restart means: end the recorded
process for certain, and see that somebody will start it. One file for each method; the ones that a node
does not use are not imported.

`services_of` is how the node was installed to run; `running` is how the agent that runs now was started.
"""

from __future__ import annotations

import json

from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.host.services.base import GRACE_S, RoleLockProbe, Services
from instar.host.services.keeper import ByHand, spawn_keeper
from instar.host.services.systemd import Systemd

__all__ = [
    "GRACE_S",
    "ByHand",
    "RoleLockProbe",
    "Services",
    "Systemd",
    "by_name",
    "installed_for",
    "running",
    "services_of",
    "spawn_keeper",
]


def services_of(layout: Layout, clock: Clock) -> Services:
    """The manager that `install` wrote down; the keeper where the record is absent or unreadable."""
    return by_name(installed_for(layout), layout, clock)


def running(layout: Layout, clock: Clock) -> Services:
    """Whoever started the agent that runs now (`detect`); as installed when none runs."""
    from instar.host.services.detect import detect

    return by_name(detect(layout, clock), layout, clock)


def installed_for(layout: Layout) -> str:
    """The manager's name in service.json: systemd, sysv, openrc, runit, supervisor, or keeper."""
    try:
        manager = json.loads((layout.state / "service.json").read_bytes())["manager"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ByHand.name
    return manager if isinstance(manager, str) and manager != "none" else ByHand.name


def by_name(name: str, layout: Layout, clock: Clock) -> Services:
    """The one called `name`; the keeper for a name that is not known."""
    if name == Systemd.name:
        return Systemd(layout, clock)
    if name == "sysv":
        from instar.host.services.sysv import Sysv

        return Sysv(layout, clock)
    if name == "openrc":
        from instar.host.services.openrc import OpenRc

        return OpenRc(layout, clock)
    if name == "runit":
        from instar.host.services.runit import Runit

        return Runit(layout, clock)
    if name == "supervisor":
        from instar.host.services.supervisor import Supervisor

        return Supervisor(layout, clock)
    if name == "bare":
        from instar.host.services.bare import Bare

        return Bare(layout, clock)
    return ByHand(layout, clock)
