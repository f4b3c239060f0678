"""Variable stores for machines that are off: with keys for Secure Boot, without an entry, as from the factory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

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
