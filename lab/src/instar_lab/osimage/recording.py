"""One real update of a system, with every write to its disk on record, from a machine that needs no server.

The slot that is written holds a third version before, with its kernel image, as on a node that has been updated
often. That one is never started, so it is made of noise.

The variables of the firmware lie in a chip of their own, not on this disk: what is replayed is the disk alone,
and a judge of it has to hold for every entry that the firmware may take.
"""

from __future__ import annotations

import importlib.resources
import json
import random
import shutil
from pathlib import Path
from typing import NamedTuple

from instar_lab.osimage import blocklog, disk, guest, uki
from instar_lab.osimage.packages import STUB, run
from instar_lab.osimage.variant import BLOCK, HARDWARE, Image
from instar_lab.osimage.vm import Vm
from instar_lab.program import build

PROGRAM = "update_alone.py"
OLDEST_BLOCKS = 1024
WITHIN_S = 420.0  # six times what an idle machine needs
DONE, ENDED = "LAB update confirmed", "LAB program ended with 0"


class Recording(NamedTuple):
    """`before` is the disk as it was, `after` as the machine left it, `writes` the record between the two."""

    before: Path
    after: Path
    writes: Path
    serial: Path
    oldest: Path  # the kernel image that lay in the slot before


def record(folder: Path, old: Image, new: Image) -> Recording:
    """Move a machine from `old` to `new` by a reboot; then make the mistakes of update_alone.py, each in a section
    of its own. Raises MachineError `not-seen` when it does not go that way."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    data.mkdir()
    program = build.build(old.version)
    (data / "instar.pyz").write_bytes(program.data)
    shutil.copy(new.bundle, data / "new.bundle")
    (data / "order.json").write_text(json.dumps(_order(old, new)))
    before, after, writes = (folder / name for name in ("before.raw", "after.raw", "writes.log"))
    disk.make(before, old, data)
    oldest = _fill(before, folder)
    disk.copy(before, after)
    source = folder / PROGRAM
    source.write_bytes((importlib.resources.files(guest) / PROGRAM).read_bytes())
    with Vm(folder / "vm", after, {"program": source}, writes) as vm:
        vm.wait_for(DONE, WITHIN_S)
        vm.wait_for(ENDED, WITHIN_S)
        vm.wait_end(WITHIN_S)
    return Recording(before, after, writes, folder / "vm" / "serial.log", oldest)


def _fill(out: Path, folder: Path) -> Path:
    """Put the third version into slot B; its kernel image."""
    chance, root, kernel = random.Random(1), folder / "oldest.root", folder / "oldest.efi"
    root.write_bytes(chance.randbytes(OLDEST_BLOCKS * BLOCK))
    size = str(root.stat().st_size)
    said = run("veritysetup", "format", "--salt=-", f"--hash-offset={size}", str(root), str(root))
    roothash = next(line.split()[-1] for line in said.splitlines() if line.startswith("Root hash"))
    added = {
        ".cmdline": f"instar.roothash={roothash} instar.blocks={OLDEST_BLOCKS}".encode(),
        ".initrd": chance.randbytes(1 << 20),
        ".linux": chance.randbytes(8 << 20),
    }
    kernel.write_bytes(uki.build(STUB.read_bytes(), added))
    run("dd", f"if={root}", f"of={out}", "bs=1M", f"seek={disk.AT_MIB['b']}", "conv=notrunc", "status=none")
    run("mcopy", "-i", f"{out}@@{disk.AT_MIB['esp']}M", str(kernel), "::/EFI/instar/b.efi")
    return kernel


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
