"""`boot-guard --state DIR`: end the trial of a system in which nobody else of ours runs.

The image starts it at each boot, beside the node's programs and not through them. On nearly every boot no slot is
on trial, and it ends at once. Else it waits; when the trial is undecided after all the time that the updater of
the new system had for it, the machine is restarted. The firmware was asked for one try only, so the old system
comes up, and its updater writes the end. One that the journal says is confirmed is left alone, also while its boot
order cannot be written. A kernel that hangs is the watchdog's.

It needs neither the EFI variables nor the EFI system partition: an image that does not mount them is one of those
that must be left. Where the mounted root cannot be told either, it restarts the machine all the same, but never
more than MOST times for one trial. `<state>/os/guard.json` counts them: {"v":1,"trial":"a 1.1.0 …","restarts":1}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from instar.core.errors import InputError, InstarError, MachineError
from instar.core.settings import Settings
from instar.core.system import LINE
from instar.core.transaction import State
from instar.engine.journal import Journals
from instar.host.boot import running
from instar.host.boot.finding import find_slots
from instar.host.boot.going_down import GoingDown
from instar.host.clock import Clock
from instar.host.files import make_folder, write_atomic
from instar.host.layout import Layout
from instar.host.records import read_config
from instar.targets.slots.records import SlotRecord, read_records

MOST = 3
LOOK_S = 5.0
DOWN_WITHIN_S = 300.0  # then it is not asked for any more, but done
RESTART = 0x01234567  # reboot(2)


class Machine(NamedTuple):
    """What the guard looks at and does; a test has its own. `running` says the slot whose root is mounted, '' when
    nobody can tell; `restart` asks for the way down, `force` does not ask."""

    running: Callable[[], str]
    restart: Callable[[], None]
    force: Callable[[], None]
    sleep: Callable[[float], None]


def bound_s(settings: Settings) -> float:
    """Seconds from the boot until the trial must have been decided: the updater, whose time begins when it runs,
    goes first."""
    return max(settings.trial.lease_s, settings.trial.cap_s) + settings.os.guard_s


def guard(layout: Layout, settings: Settings, clock: Clock, machine: Machine) -> str:
    """Returns when there is nothing to guard, saying why; after a restart was asked for, only if that fails."""
    end = bound_s(settings)
    while True:
        left = end - clock.boottime()
        try:
            found = _on_trial(layout, clock, machine)
        except MachineError:  # the records cannot be read now
            if left <= 0:
                raise
            machine.sleep(min(left, LOOK_S))
            continue
        if not found:
            return "no trial is open in this system"
        if left <= 0:
            break
        machine.sleep(min(left, LOOK_S))
    if not _count(layout, found):
        return f"left alone: {found} is undecided after {MOST} restarts"
    print(f"instar boot-guard: {found} is undecided after {end:g} s; restarting", file=sys.stderr, flush=True)
    _go_down(clock, machine)
    return "the machine did not go down"


def _on_trial(layout: Layout, clock: Clock, machine: Machine) -> str:
    """Which trial it is, if the system that runs is, or may be, the one on trial, and is not confirmed yet."""
    records = read_records(layout.slots)
    here = machine.running()
    for slot, record in records.items():
        if record.state == "trial" and here in (slot, "") and not _is_confirmed(layout, clock, slot):
            return _name(slot, record)
    return ""


def _is_confirmed(layout: Layout, clock: Clock, slot: str) -> bool:
    """Whether its updater has decided for it, and only what that brings about is not done yet: a boot order that
    cannot be written, say. A restart would end a system that is well. Journals that cannot be read say nothing, and
    must not keep the guard from its work."""
    try:
        decided = [journal.progress for journal in Journals(layout.journal, clock).read_all()]
    except (InstarError, OSError, ValueError, LookupError, TypeError):
        return False
    return any(
        each.begin.line == LINE and each.state is State.CONFIRMING and each.data.get("slot") == slot
        for each in decided
    )


def _name(slot: str, record: SlotRecord) -> str:
    return f"{slot} {record.version} {record.digest[:12]} {record.since:.0f}"


def _count(layout: Layout, trial: str) -> bool:
    """Note one more restart, before it; whether it is not one too many."""
    path = layout.system / "guard.json"
    restarts = 0
    try:
        body = json.loads(path.read_bytes())
        restarts = int(body["restarts"]) if body["trial"] == trial else 0
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if restarts >= MOST:
        return False
    try:
        make_folder(path.parent, 0o700)
        write_atomic(path, json.dumps({"v": 1, "trial": trial, "restarts": restarts + 1}).encode(), 0o600)
    except (MachineError, OSError) as error:
        # A full disk must not keep a dead system up. Each restart comes only after the whole bound, so even one that
        # is never counted is no fast loop; and the firmware was asked for this system once.
        print(f"instar boot-guard: a restart is not counted: {error}", file=sys.stderr, flush=True)
    return True


def _go_down(clock: Clock, machine: Machine) -> None:
    try:
        machine.restart()
    except MachineError as error:
        print(f"instar boot-guard: {error.text}", file=sys.stderr, flush=True)
    else:
        end = clock.boottime() + DOWN_WITHIN_S
        while clock.boottime() < end:
            machine.sleep(LOOK_S)
    machine.force()


def _running(settings: Settings) -> str:
    try:
        names = (settings.os.slots[0], settings.os.slots[1])
        return running.running(find_slots(Path(settings.os.disk), names).values())
    except (InstarError, OSError):
        return ""


def _force() -> None:
    import ctypes

    os.sync()
    ctypes.CDLL(None).reboot(ctypes.c_int(RESTART))


def _never() -> None:
    raise MachineError("kexec-refused", "a guard does not use kexec")


def main(argv: list[str]) -> int:
    import time

    parser = argparse.ArgumentParser(prog="instar boot-guard", description="End a trial that nobody decides.")
    parser.add_argument("--state", type=Path, required=True, help="the node's state folder")
    layout = Layout(parser.parse_args(argv).state)
    try:
        settings = read_config(layout)
    except InputError:
        settings = Settings()  # of a node that cannot read its settings, too
    if not settings.os.disk and not layout.slots.exists():
        return 0  # a node without slots
    machine = Machine(lambda: _running(settings), GoingDown(_never).reboot, _force, time.sleep)
    try:
        print(f"instar boot-guard: {guard(layout, settings, Clock(), machine)}", file=sys.stderr, flush=True)
    except (InstarError, OSError) as error:
        print(f"instar boot-guard: {error}", file=sys.stderr, flush=True)
        return 1
    return 0
