"""Rehearsals work; the resident agent and updater abort one second after their start."""

import os
import resource
import threading

AFTER_S = 1.0


def start(argv: list[str]) -> None:
    if argv[:1] not in (["agent"], ["updater"]) or "--rehearse" in argv:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    timer = threading.Timer(AFTER_S, os.abort)
    timer.daemon = True
    timer.start()
