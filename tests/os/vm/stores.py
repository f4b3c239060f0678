"""Variable stores for machines that are off: with keys for Secure Boot, without an entry, as from the factory."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

from virt.firmware.efi.bootentry import BootEntry
from virt.firmware.efi.devpath import DevicePath
from virt.firmware.varstore.edk2 import Edk2VarStore

from instar_lab.osimage.signing import OWNER, Keys
from instar_lab.osimage.vm import VARIABLES

TOOLS_S = 60.0


def lost(path: Path) -> None:
    """All variables are gone, as after a flat battery or a firmware update."""
    shutil.copy(VARIABLES, path)


def with_keys(path: Path, keys: Keys) -> None:
    """Empty but for the keys: Secure Boot is on, and trusts what `keys` has signed and nothing else."""
    words: list[str] = []
    for option, role in (("--set-pk", "PK"), ("--add-kek", "KEK"), ("--add-db", "db")):
        words += [option, OWNER, str(keys.certificate(role))]
    module = [sys.executable, "-m", "virt.firmware.vars"]
    done = subprocess.run(
        [*module, "-i", str(VARIABLES), "-o", str(path), *words, "--sb"],
        capture_output=True, text=True, timeout=TOOLS_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert path.exists(), done.stderr


def without(path: Path, *names: str) -> None:
    """Without these variables, as firmware loses them: `Boot0007`, say, which BootOrder may still name."""
    store = Edk2VarStore(str(path))
    variables = store.get_varlist()
    for name in names:
        del variables[name]
    store.write_varstore(str(path), variables)


def disarranged(path: Path, lose: str, foreign: str, stale: str) -> None:
    """As firmware does it that 'repairs' its entries: the one that starts the file `lose` is gone, and BootOrder has a
    foreign entry first, called `foreign`, then one of ours for a file that is nowhere, called `stale`."""
    store = Edk2VarStore(str(path))
    variables = store.get_varlist()
    order = [number for (number,) in struct.iter_unpack("<H", bytes(variables["BootOrder"].data))]
    made = [variables.add_boot_entry(foreign, DevicePath.filepath("\\EFI\\OTHER\\OTHER.EFI"))]
    for number in list(order):
        starts = BootEntry(data=variables[f"Boot{number:04X}"].data).devicepath
        if lose in str(starts):
            order.remove(number)
            variables.delete(f"Boot{number:04X}")
            starts[-1].set_filepath("\\EFI\\instar\\c.efi")  # of the same partition
            made.append(variables.add_boot_entry(stale, starts))
    variables["BootOrder"].set_boot_order([*made, *order])
    store.write_varstore(str(path), variables)
