"""One real update of a system, with every write to its disk on record, from a machine that needs no server.

The variables of the firmware lie in a chip of their own, not on this disk: what is replayed is the disk alone,
and a judge of it has to hold for every entry that the firmware may take.
"""

from __future__ import annotations

import importlib.resources
import json
import shutil
from pathlib import Path
from typing import NamedTuple

from instar_lab.osimage import blocklog, disk, guest
from instar_lab.osimage.variant import HARDWARE, Image
from instar_lab.osimage.vm import Vm
from instar_lab.program import build

PROGRAM = "update_alone.py"
WITHIN_S = 420.0  # six times what an idle machine needs
DONE, ENDED = "LAB update confirmed", "LAB program ended with 0"


class Recording(NamedTuple):
    """`before` is the disk as it was, `after` as the machine left it, `writes` the record between the two."""

    before: Path
    after: Path
    writes: Path
    serial: Path


def record(folder: Path, old: Image, new: Image) -> Recording:
    """Move a machine from `old` to `new` by a reboot; then, behind the mark `fault`, put the kernel image of `old`
    in its place once more with one flush left out. Raises MachineError `not-seen` when it does not go that way."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    data.mkdir()
    program = build.build(old.version)
    (data / "instar.pyz").write_bytes(program.data)
    shutil.copy(new.bundle, data / "new.bundle")
    (data / "order.json").write_text(json.dumps(_order(old, new)))
    before, after, writes = (folder / name for name in ("before.raw", "after.raw", "writes.log"))
    disk.make(before, old, data)
    disk.copy(before, after)
    source = folder / PROGRAM
    source.write_bytes((importlib.resources.files(guest) / PROGRAM).read_bytes())
    with Vm(folder / "vm", after, {"program": source}, writes) as vm:
        vm.wait_for(DONE, WITHIN_S)
        vm.wait_for(ENDED, WITHIN_S)
        vm.wait_end(WITHIN_S)
    return Recording(before, after, writes, folder / "vm" / "serial.log")


def _order(old: Image, new: Image) -> dict[str, object]:
    return {
        "old": {
            "version": old.version,
            "digest": old.built.custom["digest"],
            "size": old.root.stat().st_size,
        },
        "new": {
            "version": new.version,
            "digest": new.built.custom["digest"],
            "target": new.built.path,
            "length": new.built.length,
            "sha256": new.built.sha256,
            "custom": new.built.custom,
        },
        "hardware": HARDWARE,
        "mark_at": blocklog.MARK_AT,
        "magic": blocklog.MAGIC.decode(),
    }
