"""The program's one door: the first word chooses the entry, and only that entry is imported."""

from __future__ import annotations

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
}
COMMANDS = "instar.cli.main"  # everything that a person types


def main() -> int:
    words = sys.argv[1:]
    if words and words[0] in ENTRIES:
        entry = importlib.import_module(ENTRIES[words[0]])
        return int(entry.main(words[1:]))
    return int(importlib.import_module(COMMANDS).main(words))


if __name__ == "__main__":
    sys.exit(main())
