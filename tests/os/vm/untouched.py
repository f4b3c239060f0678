"""All that an update may write, as the oracles read it: to be the same before and after one that is refused."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

from virt.firmware.varstore.edk2 import Edk2VarStore

from instar_lab.osimage.disk import SLOT_MIB
from tests.os.vm import oracles
from tests.os.vm.world import Machine


def everything(machine: Machine) -> dict[str, Any]:
    """Both slots, the files of the EFI system partition, the firmware's variables. Also of a machine that is on: it
    is asked to write down what it holds in memory."""
    machine.settle()
    esp = oracles.Esp(machine.disk)
    variables = Edk2VarStore(str(machine.vm.variables)).get_varlist()
    return {
        "slots": [oracles.slot_digest(machine.disk, slot, SLOT_MIB << 20) for slot in "ab"],
        "esp": {path: hashlib.sha256(esp.read(path)).hexdigest() for path in esp.files()},
        "variables": {name: bytes(variable.data) for name, variable in variables.items()},
    }


@contextlib.contextmanager
def untouched(machine: Machine) -> Iterator[None]:
    """What is done within leaves no trace."""
    before = everything(machine)
    yield
    after = everything(machine)
    for what, was in before.items():
        assert after[what] == was, f"{what} changed\n{machine.words()}"
