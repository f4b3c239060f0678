"""The target of each line: the node's two programs always, a module's when somebody asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator

from instar.core.errors import InputError
from instar.core.modules import check_name, module_of
from instar.targets.agent_release import AgentRelease
from instar.targets.kit import Kit
from instar.targets.line import LineTarget
from instar.targets.module_release import ModuleRelease
from instar.targets.release import ReleaseTarget
from instar.targets.updater_release import UpdaterRelease


class Targets:
    """Which modules there are is read from the disk each time. For use by several threads."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._programs: dict[str, ReleaseTarget] = {
            "updater": UpdaterRelease(kit),
            "agent": AgentRelease(kit),
        }

    def of(self, line: str) -> LineTarget:
        """Raises InputError `unknown-line`, `bad-module-name`."""
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
