"""Where an update test happens: a server, and one agent installed against it. Nothing of it stays."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

from instar.core.errors import InstarError, MachineError
from instar_lab import machine
from instar_lab.fleet import INTERRUPTS, Fleet, undisturbed
from instar_lab.node import Node
from instar_lab.updatetest.builds import Build, knows
from instar_lab.updatetest.options import NODE, SYSTEM, Options

SETTINGS = """\
[trial]
hold_s = {hold_s}
lease_s = {lease_s}
cap_s = {cap_s}

[updater]
retry_floor_s = 0.1
retry_cap_s = 1.0
"""
# No ports are opened that a node of this machine may have: settings, and what a build that knows them has.
NO_PORTS = {"api": 'api = ""\n', "wake": "\n[wake]\nport = 0\n"}
LEASE_S = 30.0
GRACE_S = 3.0


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Put an interruption off to the end of the block: what is begun inside is done, or undone, first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


class Place:
    """A context manager: inside, the server runs; `install` adds the node. Leaving it takes both away.

    `fault` then says what could not be taken away, '' if nothing.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self.fleet = Fleet(0, options.keep)
        self.server = self.fleet.server
        self.node = Node(SYSTEM.state if options.system else self.fleet.folder / NODE)
        self._ours = False  # whether what lies in the node's folder is of this test
        self.fault = ""

    def __enter__(self) -> Place:
        try:
            with deferred():
                self.fleet.__enter__()
        except BaseException:
            self.fleet.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with undisturbed():
            try:
                if self._ours:
                    self._keep_words()
                    self.fault = self._uninstall()
            finally:
                self.fleet.close()

    def install(self, first: Build) -> None:
        """Have the server hand the program out, and install and start it as its user would."""
        handed = self.fleet.folder / "instar.pyz"
        self.server.hand_out(first.program, self.server.token(1), handed)
        state = self.node.state
        self._ours = not state.exists() or not any(state.iterdir())
        with deferred():
            self.node.install(handed, start=False, service="auto" if self._options.system else "none")
            self.node.layout.config.write_text(self._settings())
            self.node.cli("start")

    def _settings(self) -> str:
        """Such as every build of this test can read."""
        options = self._options
        lease_s = max(options.hold_s, min(LEASE_S, options.timeout_s / 2))
        text = SETTINGS.format(hold_s=options.hold_s, lease_s=lease_s, cap_s=2 * lease_s)
        made = [each for each in (options.first, options.alternate) if each is not None]
        return text + "".join(
            line for key, line in NO_PORTS.items() if all(knows(each, key) for each in made)
        )

    def logs(self) -> str:
        """The ends of all logs."""
        return f"{self.node.logs()}\n--- server\n{machine.tail(self.server.log)}"

    def _keep_words(self) -> None:
        """With --keep, what the node has written: the uninstall takes its folder away."""
        kept = self._options.keep
        if kept is None:
            return
        for name in ("run", "journal"):
            with contextlib.suppress(OSError, shutil.Error):
                shutil.copytree(
                    self.node.state / name, kept / "words" / name,
                    ignore=lambda _, names: [n for n in names if n.endswith((".sock", ".lock"))],
                )  # fmt: skip

    def _uninstall(self) -> str:
        """As a user would; whatever is left then is ended and removed all the same. What was wrong."""
        state, fault = self.node.state, ""
        try:
            if self.node.layout.launcher.exists():
                self.node.cli("uninstall")
            left = len(machine.naming(state))
            if left or state.exists():
                what = f"{left} of its processes" if left else f"the folder {state}"
                fault = f"expected the uninstall to leave nothing, got {what}"
        except InstarError as error:
            fault = f"cannot uninstall: {error.text}"
        try:
            machine.end_all_naming(state, GRACE_S)
        except MachineError as error:
            fault = fault or error.text
        if not self._options.system or not (state / "service.json").exists():
            _remove(state)
        return fault


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
