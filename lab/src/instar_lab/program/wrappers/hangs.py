"""The agent and the updater do nothing, for ever, and do not listen to a polite end."""

import signal


def start(argv: list[str]) -> None:
    if argv[:1] not in (["agent"], ["updater"]):
        return
    for polite in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(polite, signal.SIG_IGN)
    while True:
        signal.pause()
