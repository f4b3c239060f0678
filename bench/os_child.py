"""One system update as a node's updater makes it, in a process of its own, for its memory to be its own.

    python -m bench.os_child ORDER.json

All of it is the node's own code, driven by its journal: the child that verifies the TUF metadata, the server over
TLS with the node's certificate, the image into the slot, the slot read back. Only the firmware is missing; the mode
is `none`, so it ends where a machine would be asked to go down. The answer is one line of JSON:
{"seconds","peak","fetched","reused"}, the last three in bytes; `peak` is the most memory that was resident.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from instar.core.journal import Begin, Progress
from instar.core.settings import Settings
from instar.core.transaction import State
from instar.engine.driver import drive
from instar.engine.journal import Journals
from instar.host.boot.slots import BootState, Slot
from instar.host.clock import Clock
from instar.host.layout import Layout
from instar.host.line import Line
from instar.host.program import running_program
from instar.host.records import read_node
from instar.host.transport import Endpoint, Transport
from instar.targets.kit import Kit
from instar.targets.os_slot import OsSlot
from instar.targets.slots.platform import Platform
from instar.updater.client import ServerClient

RUNNING, IDLE = "a", "b"
NOBODY: Any = None  # what stays unused when nothing is activated


class NoFirmware:
    """Kernel images are files in a folder, and nothing chooses between them."""

    name, copies = "none", 0

    def __init__(self, esp: Path) -> None:
        self._esp = esp

    def kernel(self, slot: str) -> Path:
        return self._esp / f"{slot}.efi"

    def state(self) -> BootState:
        return BootState((RUNNING, IDLE), "", RUNNING, {}, ())

    def forget(self, slot: str) -> None:
        self.kernel(slot).unlink(missing_ok=True)

    def prepare(self, slot: str) -> None:
        return

    def try_once(self, slot: str) -> None:
        return

    def prefer(self, slot: str, trying: bool = False) -> None:
        return

    def repair(self) -> list[str]:
        return []


class Nobody:
    """Follows the update, and says nothing."""

    def changed(self, progress: Progress) -> None:
        return


def platform(order: dict[str, Any]) -> Platform:
    esp = Path(order["esp"])
    slots = {name: Slot(name, Path(order["slots"][name]), 0, order["slot_bytes"]) for name in (RUNNING, IDLE)}
    return Platform(
        slots, NoFirmware(esp), esp, NOBODY, NOBODY, (order["hardware"],), order["arch"],
        lambda: RUNNING, lambda: "firmware",
    )  # fmt: skip


def update(order: dict[str, Any]) -> dict[str, float]:
    layout, clock = Layout(Path(order["state"])), Clock()
    line = Line(layout.line("updater"))
    program = running_program(str(line.program(line.current())))
    server, header = read_node(layout).server, program.header("updater")
    transport = Transport(Endpoint(server, layout.ca, layout.certificate, layout.key, "", header))
    client = ServerClient(transport, layout, program)
    kit = Kit(layout, clock, NOBODY, client, Settings(), program, time.sleep)
    target = OsSlot(kit, platform(order))
    wish = Begin(
        order["tx"], "os", order["version"], order["digest"], order["target"], "", "", "wish", 1, mode="none"
    )
    began = time.monotonic()
    progress = drive(Journals(layout.journal, clock).begin(wish), target, Nobody())
    seconds = time.monotonic() - began
    if progress.state is not State.CONFIRMED:
        raise SystemExit(f"expected it confirmed, got {progress.state.value}: {progress.reason}")
    return {"seconds": seconds, "peak": peak(), **progress.data["bytes"]}


def peak() -> int:
    """Bytes. Not ru_maxrss: that counts what the process was before it became this program."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise SystemExit("expected a line VmHWM in /proc/self/status, got none")


if __name__ == "__main__":
    print(json.dumps(update(json.loads(Path(sys.argv[1]).read_bytes()))))
