"""A whole fleet on this machine: one real server, some real nodes, in one folder, gone when it is closed."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from instar.core.errors import InstarError
from instar_lab import machine
from instar_lab.node import Node
from instar_lab.program import build
from instar_lab.server import LabServer, NodeSeen

TOKEN_USES = 1000
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Do not be interrupted; only in the main thread, which alone gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Fleet:
    """A context manager. `keep` names a folder that stays; without it a temporary one is used and removed.

    Whatever happens inside, no process that names the folder is left when it is closed.
    """

    def __init__(self, size: int, keep: Path | None = None) -> None:
        self.size = size
        self._kept = keep is not None
        # Not TMPDIR: the path must be short enough for sockets below it.
        self.folder = (keep or Path(tempfile.mkdtemp(prefix="instar-", dir="/tmp"))).absolute()
        self.server = LabServer(self.folder / "server")
        self.nodes: list[Node] = []

    def __enter__(self) -> Fleet:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.server.create()
            self.server.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything of this fleet. It is bounded, and a second Ctrl-C does not cut it short."""
        with undisturbed():
            self.server.close()
            machine.end_all_naming(self.folder, grace_s=3.0)
            if not self._kept:
                shutil.rmtree(self.folder, ignore_errors=True)

    def add_nodes(self, program: build.Program, settings: str = "") -> None:
        """Install `size` nodes with `program` as the server hands it out, all with one token."""
        handed = self.folder / "instar.pyz"
        self.server.hand_out(program, self.server.token(TOKEN_USES), handed)
        for number in range(1, self.size + 1):
            node = Node(self.folder / f"n{number}")
            self.nodes.append(node)
            node.install(handed, settings)

    def seen(self) -> dict[str, NodeSeen]:
        """The nodes as the server sees them, by id."""
        return {node.id: node for node in self.server.nodes()}

    def check_server(self) -> None:
        """Raises MachineError with the end of its log when the server has gone."""
        self.server.check()

    def logs(self) -> str:
        """The ends of all logs, for whoever has to find out what went wrong."""
        parts = [f"--- server\n{machine.tail(self.server.log)}"]
        for node in self.nodes:
            try:
                parts.append(node.logs())
            except InstarError as error:
                parts.append(error.text)
        return "\n".join(parts)
