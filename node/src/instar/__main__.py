"""The program's one door: the first word chooses the entry, and only that entry is imported.

Nothing that an import makes is garbage, so none is looked for meanwhile: that saves 4 of the 75 ms
until the agent runs. What was imported is then left out of every later search.
"""

from __future__ import annotations

import gc
import importlib
import sys

ENTRIES = {
    "agent": "instar.agent.main",
    "updater": "instar.updater.main",
    "launch": "instar.recovery.launch",
    "guard": "instar.recovery.guard",
    "keep": "instar.recovery.keep",
    "runner": "instar.runner.main",
    "verify": "instar.oneshot.verify",
    "inspect": "instar.oneshot.identity",
    "renew": "instar.oneshot.renew",
    "fetch-module": "instar.oneshot.module",
    "cycle": "instar.oneshot.cycle",
    "boot": "instar.oneshot.boot",
    "boot-guard": "instar.oneshot.boot_guard",
}
COMMANDS = "instar.cli.main"  # everything that a person types
RESIDENTS = ("agent", "updater")  # say what they are in their first word


def main() -> int:
    words = sys.argv[1:]
    name = COMMANDS
    gc.disable()
    if words and words[0] in RESIDENTS:
        importlib.import_module("instar.host.program").read_ahead(sys.argv[0])
    if words and words[0] in ENTRIES:
        name = ENTRIES[words.pop(0)]
    entry = importlib.import_module(name)
    gc.freeze()
    gc.enable()
    return int(entry.main(words))


if __name__ == "__main__":
    sys.exit(main())
