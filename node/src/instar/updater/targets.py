"""The target of each line: the node's two programs always, a module's or the system's when somebody asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from instar.core.errors import InputError
from instar.core.modules import check_name, module_of
from instar.core.system import LINE as SYSTEM
from instar.engine.target import Target
from instar.targets.agent_release import AgentRelease
from instar.targets.kit import Kit
from instar.targets.line import LineTarget
from instar.targets.module_release import ModuleRelease
from instar.targets.release import ReleaseTarget
from instar.targets.updater_release import UpdaterRelease

if TYPE_CHECKING:
    from instar.updater.system import System


def _no_system() -> System:
    raise InputError("no-slots", "cannot use line os: this process has nothing to do with it")


class Targets:
    """Which modules there are is read from the disk each time. `system` makes what line `os` needs when it is first
    asked for. For use by several threads."""

    def __init__(self, kit: Kit, system: Callable[[], System] = _no_system) -> None:
        self._kit, self.system = kit, system
        self._programs: dict[str, ReleaseTarget] = {
            "updater": UpdaterRelease(kit),
            "agent": AgentRelease(kit),
        }

    @property
    def has_slots(self) -> bool:
        """Whether the settings name a disk with slots; it need not be there."""
        return bool(self._kit.settings.os.disk)

    def any(self, line: str) -> Target:
        """As `of`, and the system's too. Raises InputError and MachineError as `of` and `System.slot` do."""
        return self.system().slot() if line == SYSTEM else self.of(line)

    def of(self, line: str) -> LineTarget:
        """A line that has releases. Raises InputError `unknown-line`, `bad-module-name`."""
        program = self._programs.get(line)
        if program is not None:
            return program
        if name := module_of(line):
            return ModuleRelease(self._kit, name)
        raise InputError(
            "unknown-line", f"cannot use line: expected agent, updater or module/NAME, got {line!r}"
        )

    def programs(self) -> list[ReleaseTarget]:
        return list(self._programs.values())

    def modules(self) -> Iterator[ModuleRelease]:
        """Those that have a folder, with a `current` or without."""
        try:
            names = sorted(os.listdir(self._kit.layout.modules))
        except FileNotFoundError:
            return
        for name in names:
            try:
                yield ModuleRelease(self._kit, check_name(name))
            except InputError:
                continue  # nothing of ours
